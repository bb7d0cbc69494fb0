"""One step against many: a loss surface that misleads the first step (Tramèr et al. 2018, section 4)."""

from __future__ import annotations

from gambeson.attacks import FGSM
from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding
from gambeson.auditing.evidence import Evidence


def _multi_step(evidence: Evidence) -> Finding:
    single = evidence.accuracy(FGSM(eps=evidence.eps, norm=evidence.suite.norm))
    many = evidence.accuracy(evidence.suite.pgd(evidence.eps))
    return Finding(
        single.high >= many.low,
        f"accuracy under FGSM {single}, under PGD {many}, both at eps {evidence.eps:.4g}",
        {"single": single.value, "multi": many.value},
    )


DIAGNOSTICS = (
    Diagnostic(
        name="multi-step beats single-step",
        condition="a single gradient step breaks clearly more images than many",
        explanation="The loss surface misleads the gradient beyond the first step.",
        remedy="Distrust gradient attacks on this model; use transfer and query attacks, and the logits' margin.",
        look=_multi_step,
    ),
)
