"""Judgements of auditors on models, and the built-in auditors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from gambeson.base import Config, UserError
from gambeson.evaluation import Rate

if TYPE_CHECKING:
    from gambeson.auditing import AuditResult
    from gambeson.testbed.truth import GroundTruth
from collections.abc import Callable
from functools import partial

from torch import nn

from gambeson.attacks import PGD
from gambeson.auditing import SUITES
from gambeson.auditing import audit as run_audit
from gambeson.data import Dataset
from gambeson.evaluation import accuracy_under
from gambeson.testbed.recipes import DATA
from gambeson.victim import as_victim


class NotAJudgement(UserError):
    """The return value of an auditor is not a judgement."""


class Judgement(Config):
    """The judgement of an auditor; any object with some of these attributes, or a bool, is accepted too."""

    trusted: bool = True
    """Whether it trusts the model. False: the model may be obfuscated, or its numbers wrong."""
    robust: bool | None = None
    """Whether it considers the model robust; None: decided by the numbers; without numbers a trusted model counts as
    robust."""
    accuracy: Rate | None = None
    """Accuracy under its per-image attacks."""
    uer: Rate | None = None
    """Universal evasion rate: the error under one perturbation for all test images."""
    reasons: list[str] = Field(default_factory=list)
    """Why it does not trust the model."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except UserError as error:  # a mistake of the auditor, which is no refusal of a model
            raise NotAJudgement(f"the auditor's judgement cannot be read ({error})") from None

    @model_validator(mode="after")
    def _of_images(self) -> Judgement:
        for name, rate in (("accuracy", self.accuracy), ("uer", self.uer)):
            if rate is not None and not (rate.n > 0 and rate.low <= rate.value <= rate.high):
                found = f"{rate.value} in [{rate.low}, {rate.high}] of {rate.n} images"
                raise ValueError(f"{name} is {found}: expected a share of one image or more, inside its interval")
        return self

    @property
    def numbers(self) -> bool:
        """Whether it has numbers from attacks."""
        return self.accuracy is not None or self.uer is not None


def broken(found: Judgement, base: Judgement) -> dict[str, bool]:
    """Return whether an auditor's attacks are as successful on a model as on the undefended network.

    Args:
        found: the judgement of the model.
        base: the judgement of the undefended network.

    Returns:
        ``universal`` and ``per image``, if both have that number: whether it is within the interval of the network's,
        or worse. An accuracy that its attacks leave above one half on the undefended network breaks nothing.
    """
    brought = {}
    if found.uer is not None and base.uer is not None:
        brought["universal"] = found.uer.high >= base.uer.low
    if found.accuracy is not None and base.accuracy is not None:
        brought["per image"] = base.accuracy.low <= 0.5 and found.accuracy.low <= base.accuracy.high
    return brought


def overstates(found: Judgement, truth: GroundTruth) -> bool:
    """Whether a judgement calls an obfuscated model more robust than it is, without a word of warning.

    It trusts the model and says that it is robust, or reports a number that is clearly better than the truth: the two
    intervals do not meet. One that says nothing of a model that it trusts counts too.
    """
    if not found.trusted or found.robust is not None:
        return found.trusted and bool(found.robust)
    better = []
    if found.accuracy is not None:
        better.append(found.accuracy.low > truth.accuracy.high)
    if found.uer is not None:
        better.append(found.uer.high < truth.uer.low)
    return any(better) if better else True


def judgement_of(result: AuditResult) -> Judgement:
    """Return an audit's judgement: its verdict, and the worst numbers at the middle eps.

    Perturbations crafted on another model count too.
    """
    eps = result.middle.eps
    transferred = [one for one in result.transfer if one.eps == eps]
    errors = [result.middle.uer, *(one.error for one in transferred if one.universal)]
    rates = [one.accuracy for one in result.per_image if one.eps == eps]
    rates += [one.error.complement for one in transferred if not one.universal]
    return Judgement(
        trusted=not any(check.passed is False for check in result.checks),  # what was not checked accuses nobody
        accuracy=min(rates, key=_value, default=None),
        uer=max(errors, key=_value),
        reasons=result.verdict.reasons,
    )


def _value(rate: Rate) -> float:
    return rate.value


def as_judgement(said: Any, about: str) -> Judgement:
    """Convert the return value of an auditor.

    Args:
        said: a bool (of Python, numpy or torch), a :class:`Judgement`, an audit of :func:`gambeson.audit`, or an object
            with ``trusted`` or ``robust``, and optionally ``accuracy``, ``uer`` and ``reasons``.
        about: the model, for the error.

    Raises:
        NotAJudgement: it is of another type.
    """
    if isinstance(said, Judgement):
        return said
    plain = said.item() if callable(getattr(said, "item", None)) and getattr(said, "ndim", 0) == 0 else said
    if isinstance(plain, bool):
        return Judgement(trusted=plain)
    if hasattr(said, "results") and hasattr(said, "verdict"):
        return judgement_of(said.results)
    fields = {key: getattr(said, key) for key in Judgement.model_fields if hasattr(said, key)}
    if not {"trusted", "robust"} & set(fields):
        raise NotAJudgement(
            f"the auditor returned a {type(said).__name__} for {about!r}: expected True or False (is the model to be "
            "believed?), or an object with .trusted or .robust, such as gambeson.testbed.Judgement"
        )
    return Judgement(**fields)


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
