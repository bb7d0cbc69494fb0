"""Gradients that vanish or saturate: an attack that follows them has nothing to follow."""

from __future__ import annotations

import torch

from gambeson.attacks import Loss
from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding
from gambeson.auditing.evidence import Evidence

_DEAD = 0.1


def _alive(evidence: Evidence) -> Finding:
    victim, split = evidence.victim, evidence.sample
    images, labels = split.take(slice(None), victim.device)
    with torch.enable_grad():
        point = images.requires_grad_()
        value = Loss()(victim.exact(point), labels, split.ignore_index).sum()
        gradient = victim.gradient(value, point, len(images))
    dead = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    return Finding(
        dead <= _DEAD * len(images),
        f"{dead} of {len(images)} images have an input gradient of exactly zero",
        {"dead": dead / len(images)},
    )


DIAGNOSTICS = (
    Diagnostic(
        name="gradients alive",
        condition=f"more than {100 * _DEAD:g} % of images have a loss gradient of exactly zero",
        explanation="Such images cannot be attacked by following the gradient: it is saturated, detached or rounded.",
        remedy="Attack the logits before the part that hides it, or by queries.",
        look=_alive,
    ),
)
