"""Scoring: the one place where success is decided, on the model itself and from the stored, clipped perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from gambeson.base import UserError, full_precision, generator, seeded
from gambeson.base.checks import as_images
from gambeson.base.errors import some
from gambeson.data import Split, as_split
from gambeson.tasks import CLASSIFICATION, Counts, Rate, Task, answers
from gambeson.threat import Patch, perturb
from gambeson.threat.edits import Edit, check_edits
from gambeson.victim.victim import Victim


@dataclass(frozen=True, kw_only=True)
class Score:
    """Counts over a split, from which rates are computed."""

    counts: Counts
    """Right predictions of each image, and those that count: whose label is not the ignore index."""
    changed: torch.Tensor
    """(N,): predictions of each image that count and differ from the clean prediction."""

    @classmethod
    def joined(cls, parts: Sequence[Score], split: Split) -> Score:
        """Join the scores of the batches of a split.

        Raises:
            UserError: no label counts.
        """
        right, total = (torch.cat([getattr(part.counts, name).cpu() for part in parts]) for name in ("right", "total"))
        found = cls(counts=Counts(right, total), changed=torch.cat([part.changed.cpu() for part in parts]))
        if found.counts.images == 0:
            raise nothing_counts(split)
        return found

    @property
    def errors(self) -> int:
        """Predictions that differ from the label."""
        return self.counts.errors

    @property
    def flipped(self) -> int:
        """Predictions that differ from the clean prediction."""
        return int(self.changed.sum())

    @property
    def total(self) -> int:
        """Predictions that count."""
        return int(self.counts.total.sum())

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return self.counts.error

    @property
    def change_rate(self) -> Rate:
        """Share of predictions that differ from the clean ones, with its interval over images."""
        return Rate.bootstrap(self.changed, self.counts.total)


DEFAULT_VOTES = 21
"""Default number of passes over a random model whose majority decides an image (ours). A network that is wrong with
probability 0.3 on every input then gets 97 % of its images right, and two such counts differ little."""

ABSTAIN = -1
"""Prediction for an image on which no class has the majority of the votes; always an error."""

_SHARING = 25
"""Batch size for random models that draw once per batch."""


def auto_batch_size(shape: Sequence[int], most: int = 500, values: int = 2**22) -> int:
    """Return a batch size that fits in memory.

    By default for a forward without gradients: 500 images of 28 x 28, 27 colour images of 224 x 224.

    Args:
        shape: (C, H, W) of one image.
        most: maximum number of images.
        values: maximum number of input values.
    """
    return max(1, min(most, values // max(1, math.prod(shape))))


def votes_of(victim: Victim, images: torch.Tensor) -> int:
    """Return how many passes decide an image: ``victim.votes``, or one, and :data:`DEFAULT_VOTES` of a random model.

    Args:
        victim: the model, inside its context.
        images: (N, C, H, W), to inspect the model with if it has not been inspected.
    """
    if victim.votes is None:
        return DEFAULT_VOTES if len(images) and victim.inspect(images, scores=True).stochastic else 1
    return victim.votes


Shared = torch.Tensor | Patch
"""What all images have in common: a perturbation (1, C, H, W), which is added and clipped, or a patch."""


def predict(
    victim: Victim, data: object, delta: Shared | None = None, *, seed: int = 0, edit: Edit | None = None
) -> torch.Tensor:
    """Predict every image of a split, clean or under one universal perturbation; see :func:`predict_batches`.

    Args:
        victim: the model, inside its context; see :func:`votes_of` for how many votes an image has.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        delta: (1, C, H, W), a patch, or None for clean images.
        seed: of the votes, the patch's places and the edit.
        edit: what happens to the images, clean or perturbed, before the model sees them.

    Returns:
        Class indices (N,) or (N, H, W), on the CPU; :data:`ABSTAIN` without a majority.
    """
    return torch.cat(
        predict_batches(victim, as_split(data), lambda predictions, _: predictions.cpu(), delta, seed=seed, edit=edit)
    )


ReducedT = TypeVar("ReducedT")


@torch.no_grad()
def predict_batches(
    victim: Victim,
    split: Split,
    reduce: Callable[[torch.Tensor, torch.Tensor], ReducedT],
    delta: Shared | None = None,
    *,
    seed: int = 0,
    edit: Edit | None = None,
) -> list[ReducedT]:
    """Predict every image of a split, and keep of each batch what ``reduce`` makes of it: label maps may be large.

    Args:
        victim: the model, inside its context; see :func:`votes_of` for how many votes an image has.
        split: the images.
        reduce: maps predictions and labels, (B,) or (B, H, W), to what is kept.
        delta: (1, C, H, W), a patch, or None for clean images.
        seed: of the votes, so that the same call gives the same predictions; only a single pass that was asked for
            (``victim.votes`` of 1) uses the current state of the generators. Also of a patch's places, and of the
            edit: clean and perturbed images are edited alike.
        edit: what happens to the images, clean or perturbed, before the model sees them.

    Raises:
        UserError: there are no images, an edit or a perturbation that does not fit them, labels without a logit, or
            some logits are not finite.
    """
    if len(split) == 0:
        raise nothing_counts(split)
    device = delta.device if delta is not None else victim.device
    if isinstance(delta, Patch):
        delta.require_fit(split.shape, split.task)
    elif delta is not None and delta.shape[1:] != split.shape:
        raise UserError(
            f"a perturbation of shape {tuple(delta.shape)} came with images of {split.shape}: expected one for images "
            "of this shape"
        )
    if victim.votes is None:
        victim.inspect(split.take(slice(0, 8), device)[0], scores=True)
    if victim.traits is not None:
        split.check_classes(victim.traits.shape[1])
    change: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    if edit is not None:
        check_edits([edit], split.shape, split.task, split.name)
        change = edit.seeded(split.shape[0], generator(seed, "edit", str(edit)))
    carry = _as_it_is if delta is None else _carried(delta, seed)
    with nullcontext() if victim.votes == 1 else seeded(seed, "score"):
        return [
            reduce(vote(victim, change(carry(images))), labels)
            for images, labels in split.batches(auto_batch_size(split.shape), device=device)
        ]


def _as_it_is(images: torch.Tensor) -> torch.Tensor:
    return images


def _carried(delta: Shared, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return delta.seeded(seed) if isinstance(delta, Patch) else lambda images: perturb(images, delta)


@torch.no_grad()
def vote(victim: Victim, images: Any) -> torch.Tensor:
    """Return the majority class of each image (N,), or of each pixel (N, H, W).

    Voting on an image ends when the remaining votes could not change the majority. If all images of a forward share one
    draw, small batches are used, because a rate's interval assumes independent images.

    Args:
        victim: the model, inside its context; see :func:`votes_of` for how many votes an image has.
        images: (N, C, H, W), a tensor or an array, of bytes or of floats in [0, 1].

    Returns:
        Class indices; :data:`ABSTAIN` without a majority.

    Raises:
        UserError: some logits are not finite.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        images = as_images(images)
        images = (images / 255 if images.dtype == torch.uint8 else images).float().to(victim.device)
    votes = votes_of(victim, images)
    if _shared(victim, images, votes):
        return torch.cat([vote(victim, part) for part in images.split(_SHARING)])
    enough = votes // 2 + 1
    answers = torch.stack([_answers(victim, images) for _ in range(enough)])
    found = answers[0].clone()
    rows = (answers != found).transpose(0, 1).flatten(1).any(1)
    if bool(rows.any()):
        more = [_answers(victim, images[rows]) for _ in range(votes - enough)]
        found[rows] = majority(torch.stack([*answers[:, rows], *more]))
    return found


def majority(votes: torch.Tensor) -> torch.Tensor:
    """Return the class with more than half of the votes (V, N, ...), (N, ...); :data:`ABSTAIN` if there is none."""
    middle = votes.median(0).values  # a majority class is the median
    return torch.where((votes == middle).sum(0) > len(votes) // 2, middle, ABSTAIN)


@torch.no_grad()
def votes_right(
    victim: Victim, images: torch.Tensor, labels: torch.Tensor, task: Task = CLASSIFICATION
) -> torch.Tensor:
    """Return how many of its votes get each image right, (N,): a measure of how near a random model is to wrong.

    For selecting among candidates; the selected one must be scored on fresh votes.

    Args:
        victim: the model, inside its context.
        images: (N, C, H, W).
        labels: (N,).
        task: what the labels mean.

    Raises:
        UserError: some logits are not finite.
    """
    votes = votes_of(victim, images)
    if _shared(victim, images, votes):
        parts = zip(images.split(_SHARING), labels.split(_SHARING), strict=True)
        return torch.cat([votes_right(victim, *part, task) for part in parts])
    return torch.stack([task.counts(_answers(victim, images), labels).right for _ in range(votes)]).sum(0)


def _shared(victim: Victim, images: torch.Tensor, votes: int) -> bool:
    return votes > 1 and len(images) > _SHARING and victim.traits is not None and victim.traits.shared


def _answers(victim: Victim, images: torch.Tensor) -> torch.Tensor:
    with full_precision(images.device):  # a verdict in TF32 would differ from that of a processor
        return predicted(victim.forward_original(images))


class NonFiniteLogitsError(UserError):
    """A model gave NaN or infinite logits."""


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """Return the predicted class of each row of logits (N, K) or (N, K, H, W).

    Raises:
        NonFiniteLogitsError: some logits are not finite.
    """
    if len(logits) and not bool(torch.stack(logits.aminmax()).isfinite().all()):  # one pass where all are finite
        broken = ~logits.flatten(1).isfinite().all(1)
        masked = (logits == -torch.inf).transpose(0, 1).flatten(1).all(1)
        if bool(masked.any()) and bool(logits[:, ~masked].isfinite().all()):
            which = some(str(one) for one in masked.nonzero()[:, 0].tolist())
            raise NonFiniteLogitsError(
                f"the model's logit is -inf for every image at class {which}: "
                "give a masked class a large negative number instead, such as -10,000, whose losses are finite"
            )
        raise NonFiniteLogitsError(
            f"the model gave NaN or infinite logits for {int(broken.sum())} of {len(logits)} images: "
            "no rate can be computed; retrain it or load other weights"
        )
    return answers(logits)


def score(predictions: torch.Tensor, split: Split, clean: torch.Tensor | None = None, *, whole: bool = True) -> Score:
    """Count errors and changed predictions, without the ignore index.

    Args:
        predictions: what :func:`predict` returned for this split.
        split: the images with their labels.
        clean: the predictions on clean images; without them no change is counted.
        whole: whether the split is complete; the part of one process may have no prediction that counts.

    Raises:
        UserError: predictions and labels have different shapes, or no label counts.
    """
    found = score_batch(split.task, predictions, split.labels.cpu(), clean)
    if whole and found.counts.images == 0:
        raise nothing_counts(split)
    return found


def score_batches(
    victim: Victim,
    split: Split,
    delta: Shared | None = None,
    *,
    seed: int = 0,
    clean: torch.Tensor | None = None,
    edit: Edit | None = None,
) -> Score:
    """Predict and count, one batch at a time; label maps need not fit in memory.

    Args:
        victim: the model, inside its context.
        split: the images with their labels.
        delta: (1, C, H, W), a patch, or None for clean images.
        seed: of a random model's votes, the patch's places and the edit.
        clean: the predictions on clean images; without them no change is counted.
        edit: what happens to the images, clean or perturbed, before the model sees them.

    Raises:
        UserError: no label counts, or as :func:`predict_batches`.
    """
    known = None if clean is None else iter(clean.split(auto_batch_size(split.shape)))

    def count(predictions: torch.Tensor, labels: torch.Tensor) -> Score:
        return score_batch(split.task, predictions, labels, None if known is None else next(known))

    return Score.joined(predict_batches(victim, split, count, delta, seed=seed, edit=edit), split)


def score_batch(task: Task, predictions: torch.Tensor, labels: torch.Tensor, clean: torch.Tensor | None) -> Score:
    """Count what is right in predictions of a batch, (B,) or (B, H, W), and what differs from the clean ones."""
    counts = task.counts(predictions, labels)
    changed = torch.zeros_like(counts.total)
    if clean is not None:
        changed = task.units((predictions != clean.to(predictions)) & task.valid(labels)).sum(1)
    return Score(counts=counts, changed=changed)


def nothing_counts(split: Split) -> UserError:
    """Return the error for a split in which no label counts."""
    if len(split) == 0:
        return UserError(f"{split.name} holds no images: give at least one to score")
    return UserError(
        f"{split.name} has no label that counts: all {len(split)} images have the ignore index {split.ignore_index} "
        "everywhere; give images with labels"
    )
