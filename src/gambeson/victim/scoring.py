"""The one place where success is decided: from the stored, clipped perturbation, on the model itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gambeson.base import UserError
from gambeson.data import Split
from gambeson.threat import perturb
from gambeson.victim.victim import Victim


@dataclass(frozen=True, kw_only=True)
class Score:
    """Counts over a split; rates are computed from them, last."""

    errors: int
    """Answers that differ from the label."""
    changed: int
    """Answers that differ from the clean prediction."""
    answers: int
    """Answers that count: images, or pixels whose label is not the ignore index."""
    images: int

    @property
    def error(self) -> float:
        """Share of wrong answers."""
        return self.errors / max(1, self.answers)


_PIXELS_A_FORWARD = 2**22
"""Input values sent forward at once while predicting: 500 images of 28 x 28, 27 colour images of 224 x 224."""


@torch.no_grad()
def predict(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> torch.Tensor:
    """Predict every image of a split, clean or under one universal perturbation.

    Args:
        victim: the model, inside its context.
        split: the images.
        delta: (1, C, H, W), or None for clean images.

    Returns:
        Class indices (N,) or (N, H, W), on the CPU.

    Raises:
        UserError: some logits are not finite.
    """
    found = []
    device = delta.device if delta is not None else victim.device
    batch_size = min(500, max(1, _PIXELS_A_FORWARD // max(1, math.prod(split.shape))))
    for images, _ in split.batches(batch_size, device=device):
        logits = victim.exact(images if delta is None else perturb(images, delta))
        broken = ~logits.flatten(1).isfinite().all(1)
        if broken.any():
            raise UserError(
                f"the model gave NaN or infinite logits for {int(broken.sum())} of {len(images)} images: "
                "no rate can be taken; train it again or load other weights"
            )
        found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def score(predictions: torch.Tensor, split: Split, clean: torch.Tensor | None = None) -> Score:
    """Count errors and changed predictions, the ignore index left out.

    Args:
        predictions: what :func:`predict` returned for this split.
        split: the images with their labels.
        clean: the predictions on clean images; without them nothing counts as changed.
    """
    labels = split.labels.cpu()
    if predictions.shape != labels.shape:
        raise UserError(
            f"the model answers with shape {tuple(predictions.shape)}, but the labels have {tuple(labels.shape)}: "
            "expected logits (N, K) for labels (N,), or (N, K, H, W) for labels (N, H, W)"
        )
    valid = torch.ones_like(labels, dtype=torch.bool) if split.ignore_index is None else labels != split.ignore_index
    changed = 0 if clean is None else int(((predictions != clean) & valid).sum())
    return Score(
        errors=int(((predictions != labels) & valid).sum()),
        changed=changed,
        answers=int(valid.sum()),
        images=len(labels),
    )
