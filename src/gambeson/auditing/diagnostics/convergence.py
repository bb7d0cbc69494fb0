"""Attacks that have not done all they could: more budget would lower the accuracy further."""

from __future__ import annotations

import math

from gambeson.attacks import PGD
from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding
from gambeson.auditing.evidence import Evidence

_LEFT = 0.05


def _whole_box(evidence: Evidence) -> Finding:
    norm = evidence.suite.norm
    eps = 1.0 if norm == "inf" else math.sqrt(math.prod(evidence.test.shape))
    left = evidence.accuracy(PGD(eps=eps, norm=norm, steps=40))
    return Finding(
        left.low <= _LEFT, f"accuracy under PGD with the whole box allowed: {left}", {"accuracy": left.value}
    )


DIAGNOSTICS = (
    Diagnostic(
        name="unbounded attack succeeds",
        condition=f"with the whole box allowed, clearly more than {100 * _LEFT:g} % of images stay right",
        explanation="With the whole box allowed every image can be made anything: the attack fails for another reason "
        "than the model's robustness.",
        remedy="Find what stops the gradient; attack by queries or transfer.",
        look=_whole_box,
    ),
)
