"""A model whose answers are not the same twice: what one draw says of it is chance."""

from __future__ import annotations

import torch

from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding
from gambeson.auditing.evidence import Evidence
from gambeson.evaluation.universal import DRAWS


def _deterministic(evidence: Evidence) -> Finding:
    images, _ = evidence.sample.take(slice(None), evidence.victim.device)
    with torch.no_grad():
        first, second = evidence.victim.exact(images), evidence.victim.exact(images)
    gap = float((first - second).abs().max())
    return Finding(
        gap == 0,
        f"two forwards of the same images differ by at most {gap:.3g} in their logits"
        + ("" if gap == 0 else f"; gradients were averaged over {DRAWS} draws, every rate is of one pass"),
        {"gap": gap},
    )


DIAGNOSTICS = (
    Diagnostic(
        name="deterministic",
        condition="two forwards of the same images differ",
        explanation="The model is random: one draw decides neither a gradient nor a rate.",
        remedy="Turn the randomness off, or average gradients and rates over many draws.",
        look=_deterministic,
        gradients=False,
    ),
)
