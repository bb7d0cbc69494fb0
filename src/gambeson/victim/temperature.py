"""The scale of the logits: cross-entropy leads an attack well at one of them, and badly far from it.

Much larger logits saturate the softmax, and gradients vanish or see one class alone; in much smaller ones all wrong
classes weigh alike, and an image that is fooled weighs as much as one that is not. Predictions do not depend on the
scale at all. So attacks use logits whose probabilities are honest ones: divided by the temperature that calibrates
them (Guo et al. 2017, section 4.2), where that is far from 1. Scores are taken of the logits as they are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.base import Number, seeded
from gambeson.data import Split
from gambeson.victim.inspect import size_of
from gambeson.victim.victim import Victim

USUAL = (0.5, 2.0)
"""Calibrating temperatures between which logits are left as they are. Ours: near calibration the attacks are about as
strong (``benchmarks/scale.py``)."""
IMAGES = 200
"""Images that are looked at."""
_PIXELS = 2**14
"""Answers that are looked at, of label maps."""
_LARGEST = 1e30
_OUT_OF_REACH = 1000
"""A class that stays this many times the size of the logits below the best is masked, and says nothing of their scale.
Ours: the logits of trained models are within tens."""

Temperature = Literal["auto"] | Annotated[Number, Field(gt=0)]
"""What an attack divides the logits by. ``auto`` (ours): by :func:`temperature`, whose cost is a forward of
:data:`IMAGES` validation images; an entered :class:`gambeson.victim.Victim` that has one keeps it. 1: the logits as
they are, as in the papers."""


@contextmanager
def rescaled(victims: Sequence[Victim], to: Temperature, split: Split, seed: int) -> Iterator[None]:
    """Set the temperature of each victim inside the block.

    Args:
        victims: the models, inside their contexts.
        to: the temperature; ``auto``: each its own, if it has none yet.
        split: images that nothing is reported on.
        seed: see :func:`calibrating`.
    """
    # Of a mean of losses the members have theirs.
    victims = [victim for victim in victims if getattr(victim, "average", None) != "losses"]
    before = [(victim, victim.temperature) for victim in victims]
    try:
        for victim in victims:
            if to != "auto":
                victim.temperature = float(to)
            elif victim.temperature is None:
                victim.temperature = temperature(victim, split, seed)
        yield
    finally:
        for victim, kept in reversed(before):  # one may be there twice
            victim.temperature = kept


def temperature(victim: Victim, split: Split, seed: int) -> float:
    """Return what to divide the logits by: the temperature that calibrates them, or 1 where that is :data:`USUAL`.

    1 also where there is none: a single logit, logits that are all alike, or not finite. Arguments as in
    :func:`calibrating`.
    """
    found = calibrating(victim, split, seed)
    return 1.0 if math.isnan(found) or USUAL[0] <= found <= USUAL[1] else found


@torch.no_grad()
def calibrating(victim: Victim, split: Split, seed: int) -> float:
    """Return the temperature at which the cross-entropy of clean images is least; NaN where there is none.

    Labels are smoothed by one image's worth, so that a model without an error is not sharpened without end. Classes
    masked by a large negative number do not count.

    Args:
        victim: the model, inside its context.
        split: images that nothing is reported on; 200 of them are looked at.
        seed: of these images, and of a random model's draws.
    """
    count = min(IMAGES, len(split))
    answers, truths = [], []
    with seeded(seed, "scale"):
        for images, labels in split.sample(count, seed=seed).batches(20, device=victim.device):
            logits = victim.forward_original(images)
            if logits.ndim < 2 or logits.shape[1] < 2:
                return math.nan
            split.check_classes(logits.shape[1])
            rows, truth = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
            known = split.task.valid(labels).flatten().nonzero().flatten()
            # Label maps are thinned out batch by batch: all their pixels would not fit into memory.
            most = min(len(known), max(1, _PIXELS * len(images) // count))
            few = known[torch.linspace(0, len(known) - 1, most, dtype=torch.float64).round().long()]
            answers.append(rows[few].double().cpu())
            truths.append(truth[few].cpu())
    z, y = torch.cat(answers), torch.cat(truths)
    if len(y):
        possible = (z.amax(1, keepdim=True) - z).amin(0) <= _OUT_OF_REACH * size_of(z)
        z, y = z[possible[y]][:, possible], (possible.cumsum(0) - 1)[y[possible[y]]]
    unit = float((z.amax(1) - z.mean(1)).median()) if len(y) else math.nan
    if not (math.isfinite(unit) and 1 / _LARGEST < unit < _LARGEST):
        return math.nan
    smoothing = 1 / (len(y) + 1)
    shares = torch.logspace(-2, 2, 401, dtype=torch.float64)

    def loss(k: int) -> float:
        return float(torch.nn.functional.cross_entropy(z / (unit * shares[k]), y, label_smoothing=smoothing))

    # Convex in the inverse temperature, so that it falls before its minimum and rises after it.
    best = bisect_left(range(len(shares) - 1), True, key=lambda k: loss(k) <= loss(k + 1))
    return unit * float(shares[best]) if math.isfinite(loss(best)) else math.nan
