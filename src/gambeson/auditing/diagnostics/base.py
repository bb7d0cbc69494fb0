"""Diagnostics: conditions under which numbers cannot be trusted, with explanations and remedies; their registry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import Check
from gambeson.base import Registered, Registry, UserError


@dataclass(frozen=True)
class Finding:
    """Result of a diagnostic."""

    passed: bool | None
    """None: it does not apply to this model."""
    detail: str
    """What was compared, with the numbers; or why it does not apply."""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A condition under which the audit's numbers cannot be trusted."""

    name: str
    condition: str
    """When it fails."""
    explanation: str
    """What a failure means."""
    remedy: str
    """What to do about it."""
    function: Callable[[AuditContext], Finding]
    gradients: bool = True
    """Whether it needs gradients, so that it does not apply to a black box."""
    comparisons: int = 1
    """Comparisons of rates that it makes at most, each at the level :data:`gambeson.auditing.outcome.LEVEL`."""
    needs: tuple[str, ...] = ()
    """Stages, or settings of the suite, whose results it reads: where the time or the budget left one out, it counts as
    not run."""

    def check(self, context: AuditContext) -> Check:
        """Run the diagnostic and return its check."""
        if self.gradients and context.subject.black_box:
            found = Finding(None, "a black box has no gradients to look at")
        else:
            found = self.function(context)
        return Check(
            name=self.name,
            passed=found.passed,
            detail=found.detail,
            condition=self.condition,
            explanation=self.explanation,
            remedy=self.remedy,
            numbers={name: value for name, value in found.numbers.items() if math.isfinite(value)},
        )


DiagnosticFunction = Callable[[AuditContext], Finding]
"""Measures, compares, and returns a :class:`Finding`."""


def _fault(target: object) -> str | None:
    return None if inspect.isfunction(target) else "expected a function of the AuditContext that returns a Finding"


REGISTRY: Registry[DiagnosticFunction] = Registry(
    "diagnostic", "gambeson.diagnostics", room="gambeson.auditing.diagnostics", check=_fault, what="function"
)
"""Every diagnostic: of this library, of installed packages (group ``gambeson.diagnostics``), and of this process."""


def register(
    name: str,
    *,
    condition: str,
    explanation: str,
    remedy: str,
    gradients: bool = True,
    comparisons: int = 1,
    needs: tuple[str, ...] = (),
) -> Callable[[DiagnosticFunction], DiagnosticFunction]:
    """Register a function as a diagnostic: ``@register("name", condition=..., explanation=..., remedy=...)``.

    Args:
        name: the property that holds when it passes.
        condition: when it fails.
        explanation: what a failure means.
        remedy: what to do about it.
        gradients: whether it needs gradients, so that it does not apply to a black box.
        comparisons: of rates that it makes at most, each at the level :data:`gambeson.auditing.outcome.LEVEL`.
        needs: stages, or settings of the suite, whose results it reads; see :class:`Diagnostic`.
    """
    about = {"condition": condition, "explanation": explanation, "remedy": remedy, "gradients": gradients}
    about |= {"comparisons": comparisons, "needs": needs}
    summary = f"Never fails: {condition[7:]}." if condition.startswith("never: ") else f"Fails where {condition}."
    return REGISTRY.register(name, title=name, summary=summary, **about)


def entries() -> list[Registered[DiagnosticFunction] | UserError]:
    """Every diagnostic; an error in place of one whose package cannot be imported."""
    return REGISTRY.entries()


def built_in() -> list[Diagnostic]:
    """The diagnostics of this library, in the order in which they are defined."""
    return [_diagnostic(entry) for entry in REGISTRY.own()]


def get(name: str) -> Diagnostic:
    """Return a diagnostic by its registered name, or by ``FILE.py:FUNCTION``.

    Raises:
        UserError: there is none, or its package or file does not run or does not register it.
    """
    return _diagnostic(REGISTRY.get(name))


def _diagnostic(entry: Registered[DiagnosticFunction]) -> Diagnostic:
    if "title" not in entry.options:
        raise UserError(
            f"the function {entry.target.__name__} of {entry.owner} is no diagnostic: put @gambeson.auditing.register("
            "name, condition=..., explanation=..., remedy=...) above it"
        )
    kept = ("condition", "explanation", "remedy", "gradients", "comparisons", "needs")
    about = {key: entry.options[key] for key in kept}
    return Diagnostic(name=entry.options["title"], function=entry.target, **about)


def class_share(context: AuditContext, *, rarest: bool = False) -> float:
    """Share of the most frequent class, or of the rarest that occurs: the accuracy of always naming it."""
    labels = context.test.labels[context.test.task.valid(context.test.labels)]
    if not len(labels):
        return 0.0
    counts = labels.bincount()
    return float((counts[counts > 0].min() if rarest else counts.max()) / len(labels))
