"""Outcomes of per-image attacks: correct predictions per image, from which accuracies are computed."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from gambeson.attacks import GradientAttack
from gambeson.base import derive, seeded
from gambeson.data import Split
from gambeson.tasks import Counts, Rate, Task
from gambeson.victim import Victim, auto_batch_size, nothing_counts, predict, vote
from gambeson.victim.averaged import EOT_SAMPLES


class ImageAttack(Protocol):
    """A per-image attack, as those of :mod:`gambeson.attacks`."""

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images in the shape of ``x``."""
        ...


def outcome(victim: Victim, split: Split, attack: ImageAttack, seed: int, batch_size: int = 250) -> Counts:
    """Attack every image; what is right is decided here, on the images that the attack returned.

    On a random model a gradient attack averages over :data:`EOT_SAMPLES` samples unless it sets a number, and the
    majority of votes decides (:func:`gambeson.victim.votes_of`).

    Args:
        victim: the model, inside its context.
        split: the images.
        attack: a per-image attack.
        seed: of the attack and of a random model's votes.
        batch_size: maximum batch size; smaller for large images.

    Raises:
        UserError: some logits are not finite, or no label of the split counts.
    """
    if len(split) == 0:
        raise nothing_counts(split)
    attack = averaged(attack, victim, split.take(slice(0, 8), victim.device)[0])
    right, total = [], []
    with seeded(seed, "score"):
        for k, (images, labels) in enumerate(split.batches(at_once(split, batch_size), device=victim.device)):
            moved = attack(victim, images, labels, seed=derive(seed, "batch", k), task=split.task)
            found = split.task.counts(vote(victim, moved), labels)
            right.append(found.right.cpu())
            total.append(found.total.cpu())
    return _counted(Counts(torch.cat(right), torch.cat(total)), split)


def outcome_under(victim: Victim, split: Split, delta: torch.Tensor, *, seed: int = 0) -> Counts:
    """Count what one perturbation (1, C, H, W) leaves right of a split, as :func:`gambeson.victim.predict` does."""
    predictions = predict(victim, split, delta.to(victim.device), seed=seed)
    return _counted(split.task.counts(predictions, split.labels.cpu()), split)


def accuracy_under(victim: Victim, split: Split, attack: ImageAttack, seed: int, batch_size: int = 250) -> Rate:
    """Accuracy on images that ``attack`` perturbs one by one; see :func:`outcome`."""
    return outcome(victim, split, attack, seed, batch_size).accuracy


def _counted(counts: Counts, split: Split) -> Counts:
    if counts.images == 0:
        raise nothing_counts(split)
    return counts


AttackT = TypeVar("AttackT", bound=ImageAttack)


def averaged(attack: AttackT, victim: Victim, images: torch.Tensor, samples: int = EOT_SAMPLES) -> AttackT:
    """Return the attack adapted to a model: for a random one, with gradients averaged over several samples.

    Args:
        attack: any attack; others than gradient attacks, and those that set ``eot_samples``, are returned unchanged.
        victim: the model, inside its context.
        images: (N, C, H, W), to inspect the model with if it has not been inspected.
        samples: number of samples.
    """
    if (
        isinstance(attack, GradientAttack)
        and attack.eot_samples is None
        and victim.inspect(images, scores=True).stochastic
    ):
        return attack.model_copy(update={"eot_samples": samples})
    return attack


def at_once(split: Split, most: int = 250) -> int:
    """Return the batch size for attacks on a split: 250 images of 32 pixels, 170 of 64 in colour, 13 of 224."""
    return auto_batch_size(split.shape, most, 2**21)
