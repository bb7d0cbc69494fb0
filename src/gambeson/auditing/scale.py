"""The scale of the logits: cross-entropy leads an attack well at one of them, and badly far from it.

Much larger logits saturate the softmax, and gradients vanish or see one class alone; in much smaller ones all wrong
classes weigh alike, and an image that is fooled weighs as much as one that is not. Predictions do not depend on the
scale at all. So attacks climb logits that are brought to one scale, and scores are taken of the logits as they are.
"""

from __future__ import annotations

import math

import torch

from gambeson.base import seeded
from gambeson.data import Split
from gambeson.victim import Victim

MARGIN = 3.0
"""The median margin of clean images that attacks climb at. Ours: PGD and stochastic PGD are strongest where it is
between 2 and 8, on plain and on hardened networks (``benchmarks/scale.py``)."""
_IMAGES = 200
_LARGEST = 1e30


@torch.no_grad()
def temperature(victim: Victim, split: Split, seed: int) -> float:
    """Return what to divide the logits by, so that the median of first minus second is :data:`MARGIN`.

    1 where that cannot be: logits that are all alike, or not finite.

    Args:
        victim: the model, inside its context.
        split: images that nothing is reported on; the first 200 are looked at.
        seed: of a random model's draws.
    """
    margins = []
    with seeded(seed, "scale"):
        for images, _ in split.subset(torch.arange(min(_IMAGES, len(split)))).batches(20, device=victim.device):
            first, second = victim.exact(images).double().topk(2, dim=1).values.unbind(1)
            margins.append((first - second).flatten().cpu())
    found = float(torch.cat(margins).median()) / MARGIN
    return found if math.isfinite(found) and 1 / _LARGEST < found < _LARGEST else 1.0
