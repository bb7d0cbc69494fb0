"""What a diagnostic is: a condition under which numbers mean nothing, why, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Check


@dataclass(frozen=True)
class Finding:
    """What a diagnostic saw."""

    passed: bool | None
    """None: it does not apply to this model."""
    detail: str
    """What was compared, with the numbers; why it does not apply."""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A condition under which the audit's numbers could not be trusted."""

    name: str
    condition: str
    """When it fails."""
    explanation: str
    """What a failure means."""
    remedy: str
    """What to do then."""
    look: Callable[[Evidence], Finding]
    gradients: bool = True
    """It needs gradients, and so does not apply to a black box."""

    def check(self, evidence: Evidence) -> Check:
        """Look, and write down what was seen."""
        if self.gradients and evidence.subject.black_box:
            found = Finding(None, "a black box has no gradients to look at")
        else:
            found = self.look(evidence)
        return Check(
            name=self.name,
            passed=found.passed,
            detail=found.detail,
            condition=self.condition,
            explanation=self.explanation,
            remedy=self.remedy,
            numbers={name: value for name, value in found.numbers.items() if math.isfinite(value)},
        )
