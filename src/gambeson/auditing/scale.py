"""The scale of the logits: cross-entropy leads an attack well at one of them, and badly far from it.

Much larger logits saturate the softmax, and gradients vanish or see one class alone; in much smaller ones all wrong
classes weigh alike, and an image that is fooled weighs as much as one that is not. Predictions do not depend on the
scale at all. So attacks climb logits that are brought to a usual scale, and scores are taken of the logits as they are.
"""

from __future__ import annotations

import math

import torch

from gambeson.base import seeded
from gambeson.data import Split
from gambeson.victim import Victim

USUAL = (3.0, 12.0)
"""Median margins of clean images between which logits are left as they are; others are brought to the nearer end.
Ours: where in that range PGD and stochastic PGD are strongest differs from net to net; beyond it PGD is weaker on
every net that was tried (``benchmarks/scale.py``)."""
_IMAGES = 200
_LARGEST = 1e30


def temperature(victim: Victim, split: Split, seed: int) -> float:
    """Return what to divide the logits by, so that their median margin is :data:`USUAL`.

    1 where it is, and where it cannot be: logits that are all alike, or not finite. Arguments as in :func:`margin_of`.
    """
    margin = margin_of(victim, split, seed)
    if not (math.isfinite(margin) and 1 / _LARGEST < margin < _LARGEST):
        return 1.0
    return margin / min(max(margin, USUAL[0]), USUAL[1])


@torch.no_grad()
def margin_of(victim: Victim, split: Split, seed: int) -> float:
    """Return the median, over images, of the first logit minus the second; NaN where there is no second.

    Args:
        victim: the model, inside its context.
        split: images that nothing is reported on; the first 200 are looked at.
        seed: of a random model's draws.
    """
    margins = []
    with seeded(seed, "scale"):
        for images, _ in split.subset(torch.arange(min(_IMAGES, len(split)))).batches(20, device=victim.device):
            logits = victim.exact(images).double()
            if logits.ndim < 2 or logits.shape[1] < 2:
                return math.nan
            first, second = logits.topk(2, dim=1).values.unbind(1)
            margins.append((first - second).flatten().cpu())
    return float(torch.cat(margins).median())
