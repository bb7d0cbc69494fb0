"""Built-in auditors: the suites of the audit, and PGD of 20 steps, which trusts every model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from gambeson.attacks import PGD
from gambeson.auditing import SUITES
from gambeson.auditing import audit as run_audit
from gambeson.base import UserError, unknown_name
from gambeson.base.user_code import canonical, file_of, is_spelling
from gambeson.data import Dataset
from gambeson.evaluation import accuracy_under
from gambeson.models.external import load_function
from gambeson.testbed.judgement import Judgement, judgement_of
from gambeson.testbed.recipes import DATA
from gambeson.victim import as_victim


def pgd(model: nn.Module, data: Dataset) -> Judgement:
    """PGD of 20 steps on cross-entropy; every model is trusted."""
    eps = DATA[data.name].radius
    with as_victim(model) as victim:
        return Judgement(accuracy=accuracy_under(victim, data.test, PGD(eps=eps, steps=20), 0))


def audit(model: nn.Module, data: Dataset, *, suite: str) -> Judgement:
    """:func:`gambeson.audit` with one of its suites: its verdict, and the worst numbers of its attacks."""
    return judgement_of(run_audit(model, data, suite).results)


AUDITORS: dict[str, Callable[[nn.Module, Dataset], Judgement]] = {
    "pgd": pgd,
    **{suite: partial(audit, suite=suite) for suite in SUITES},
}
"""The built-in auditors by name: ``pgd``, and the suites of the audit."""


def auditor_named(name: str) -> tuple[str, Callable[..., Any]]:
    """Return an auditor by name: a built-in one, or ``FILE.py:FUNCTION``.

    Raises:
        UserError: no auditor of that name, or no such function in the file.
    """
    if name in AUDITORS:
        return name, AUDITORS[name]
    if not is_spelling(name):
        raise unknown_name("auditor", name, [*AUDITORS, "FILE.py:FUNCTION"])
    if not file_of(name).is_file():
        raise UserError(f"{file_of(name)} does not exist: --auditor FILE.py:FUNCTION names a function of your own file")
    return canonical(name), load_function(name)
