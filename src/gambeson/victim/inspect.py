"""Where the logits are in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, seeded

KEYS = ("logits", "out")
"""Where the logits are looked for in a mapping: the customs of transformers and of torchvision's segmentation."""


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits in a model's output.

    That is the output itself; its ``.logits``; the entry ``logits`` or ``out`` of a mapping; or the first of several.

    Raises:
        UserError: there are none.
    """
    found = output
    if not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = next((output[key] for key in KEYS if key in output), None)
        elif found is None and isinstance(output, Sequence) and len(output):
            found = output[0]
    if not isinstance(found, torch.Tensor):
        keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise UserError(
            f"the model returned {type(output).__name__}{keys}: expected a tensor of logits, an object with `.logits`, "
            "a mapping with `logits` or `out`, or a tuple that starts with them; wrap the model so that it returns "
            "the logits alone, for example by gb.models.as_logits(model, 'KEY')"
        )
    return found


CALLS = 5
"""Calls with the same images that have to agree."""
_FEW = 8


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """What was seen."""

    gap: float
    """Largest difference between the logits of two calls with the same images; above zero the model is random."""
    shared: bool
    """The model is random and gives equal images of one batch equal answers: copies in one forward are no fresh
    draws."""
    writes: bool
    """The model changes the images it is given."""
    probabilities: bool
    """Every row lies in [0, 1] and sums to 1."""

    @property
    def stochastic(self) -> bool:
        """Whether two calls differ."""
        return self.gap > 0


@torch.no_grad()
def inspect_model(model: nn.Module, images: torch.Tensor) -> ModelTraits:
    """Send a few images through a model, a few times; torch's global generators stay as they were.

    A model that repeats itself is asked :data:`CALLS` times before it is believed: one that draws among few sizes or
    places may well draw the same twice.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W) in [0, 1]; the first few are looked at.

    Raises:
        UserError: what comes back has not one row per image.
    """
    few = images[:_FEW].detach()
    with seeded(0, "look"):
        given = few.clone()
        first = logits_of(model(given))
        if first.ndim not in (2, 4) or len(first) != len(few):
            raise UserError(
                f"the model was given {len(few)} images and returned shape {tuple(first.shape)}: expected logits "
                "(N, K), or (N, K, H, W) for one answer per pixel"
            )
        writes = not torch.equal(given, few)
        gap, calls = 0.0, 1
        while gap == 0 and calls < CALLS:
            again, calls = logits_of(model(few.clone())), calls + 1
            # Equal infinities differ by NaN; what is not finite is another matter and is refused where it is scored.
            gap = float((first - again).abs().nan_to_num(0.0, 0.0).max())
        one, other = logits_of(model(few[:1].repeat(2, 1, 1, 1)))[:2]
        shared = gap > 0 and torch.equal(one, other)
    total = first.sum(1)
    probabilities = bool((first >= 0).all() and (first <= 1).all() and ((total - 1).abs() < 1e-3).all())
    return ModelTraits(gap=gap, shared=shared, writes=writes, probabilities=probabilities)
