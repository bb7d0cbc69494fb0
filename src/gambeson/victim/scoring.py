"""The one place where success is decided: from the stored, clipped perturbation, on the model itself."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from gambeson.base import UserError, seeded
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


DRAWS = 21
"""Passes over a random model whose majority decides an image, where nothing else is said (ours). A net that is wrong
with probability 0.3 whatever the input then gets 97 % of its images right, and two such counts differ little."""

NO_ANSWER = -1
"""The prediction of a random model for an image that no class has the majority of the passes for: always an error."""

_PIXELS_A_FORWARD = 2**22
"""Input values sent forward at once while predicting: 500 images of 28 x 28, 27 colour images of 224 x 224."""

_SHARING = 25
"""Images that share their draws where a random model draws once for a batch."""


@torch.no_grad()
def predict(victim: Victim, split: Split, delta: torch.Tensor | None = None, *, seed: int = 0) -> torch.Tensor:
    """Predict every image of a split, clean or under one universal perturbation.

    Args:
        victim: the model, inside its context; its ``passes`` say how many votes an image has.
        split: the images.
        delta: (1, C, H, W), or None for clean images.
        seed: of the draws of a model that is asked several times, so that the same call gives the same answers; one
            that is asked once draws from wherever the caller left torch's generators.

    Returns:
        Class indices (N,) or (N, H, W), on the CPU; :data:`NO_ANSWER` where no class has the majority.

    Raises:
        UserError: some logits are not finite.
    """
    device = delta.device if delta is not None else victim.device
    batch_size = min(500, max(1, _PIXELS_A_FORWARD // max(1, math.prod(split.shape))))
    with seeded(seed, "score") if victim.passes > 1 else nullcontext():
        return torch.cat(
            [
                vote(victim, images if delta is None else perturb(images, delta)).cpu()
                for images, _ in split.batches(batch_size, device=device)
            ]
        )


@torch.no_grad()
def vote(victim: Victim, images: torch.Tensor) -> torch.Tensor:
    """Return the class of each image (N,), or of each pixel (N, H, W), that more than half of the passes name.

    An image is decided once so many passes agree that the others could change nothing. Where all images of a forward
    share one draw, few are sent at a time: a rate's interval takes images for independent.

    Args:
        victim: the model, inside its context; its ``passes`` say how many votes an image has.
        images: (N, C, H, W).

    Returns:
        Class indices; :data:`NO_ANSWER` where no class has the majority.

    Raises:
        UserError: some logits are not finite.
    """
    if victim.passes > 1 and len(images) > _SHARING and victim.look is not None and victim.look.shared:
        return torch.cat([vote(victim, part) for part in images.split(_SHARING)])
    enough = victim.passes // 2 + 1
    answers = torch.stack([_answers(victim, images) for _ in range(enough)])
    found = answers[0].clone()
    rows = (answers != found).transpose(0, 1).flatten(1).any(1)
    if bool(rows.any()):
        more = [_answers(victim, images[rows]) for _ in range(victim.passes - enough)]
        votes = torch.stack([*answers[:, rows], *more])
        middle = votes.median(0).values  # what more than half name is the median
        found[rows] = torch.where((votes == middle).sum(0) >= enough, middle, NO_ANSWER)
    return found


def _answers(victim: Victim, images: torch.Tensor) -> torch.Tensor:
    logits = victim.exact(images)
    broken = ~logits.flatten(1).isfinite().all(1)
    if broken.any():
        raise UserError(
            f"the model gave NaN or infinite logits for {int(broken.sum())} of {len(images)} images: "
            "no rate can be taken; train it again or load other weights"
        )
    return logits.argmax(1)


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
