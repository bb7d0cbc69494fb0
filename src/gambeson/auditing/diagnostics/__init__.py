"""Diagnostics: signs that robustness numbers cannot be trusted; a single failure overturns the verdict.

Each file is a family of diagnostics, which are functions registered with ``@register``.
"""

from gambeson.auditing.diagnostics.base import Diagnostic, Finding, built_in, entries, get, register

_FAMILIES = (
    "randomness",
    "statefulness",
    "rescoring",
    "gradient_masking",
    "incomplete_gradients",
    "continuity",
    "single_step",
    "convergence",
    "active_test",
    "black_box_gap",
    "universal",
    "test_leakage",
)


def _place(diagnostic: Diagnostic) -> int:
    family = diagnostic.function.__module__.rpartition(".")[2]
    return _FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES)


DIAGNOSTICS: tuple[Diagnostic, ...] = tuple(sorted(built_in(), key=_place))
"""Every diagnostic of this library in the order in which an audit runs them: by family, and within one as defined."""

__all__ = ["DIAGNOSTICS", "Diagnostic", "Finding", "entries", "get", "register"]
