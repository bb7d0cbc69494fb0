"""Outcomes of per-image attacks: correct predictions per image, from which accuracies are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gambeson.attacks import GradientAttack
from gambeson.base import derive, seeded
from gambeson.data import Split
from gambeson.evaluation.rates import Rate
from gambeson.victim import Victim, auto_batch_size, nothing_counts, predict, right_answers, vote
from gambeson.victim.averaged import EOT_SAMPLES


class ImageAttack(Protocol):
    """A per-image attack, as those of :mod:`gambeson.attacks`."""

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, ignore_index: int | None = None
    ) -> torch.Tensor:
        """Return perturbed images in the shape of ``x``."""
        ...


@dataclass(frozen=True)
class Outcome:
    """Correct predictions per image under one attack; a label map has many predictions per image."""

    right: torch.Tensor
    """(N,): correct predictions."""
    answers: torch.Tensor
    """(N,): predictions that count; 1 for an image with one label, 0 if that is the ignore index."""

    @property
    def rate(self) -> Rate:
        """Accuracy, with its interval over the images with a prediction that counts."""
        return Rate.of(int(self.right.sum()), int(self.answers.sum()), int((self.answers > 0).sum()))

    @property
    def shares(self) -> torch.Tensor:
        """(M,) float64: the share of correct predictions, for each image with any that count."""
        counted = self.answers > 0
        return self.right[counted].double() / self.answers[counted]


def outcome(victim: Victim, split: Split, attack: ImageAttack, seed: int, batch_size: int = 250) -> Outcome:
    """Attack every image; success is decided here, on the returned images.

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
    right, answers = [], []
    with seeded(seed, "score"):
        for k, (images, labels) in enumerate(split.batches(at_once(split, batch_size), device=victim.device)):
            moved = attack(victim, images, labels, seed=derive(seed, "batch", k), ignore_index=split.ignore_index)
            found = right_answers(vote(victim, moved), labels, split.ignore_index)
            right.append(found[0].cpu())
            answers.append(found[1].cpu())
    return _counted(torch.cat(right), torch.cat(answers), split)


def outcome_under(victim: Victim, split: Split, delta: torch.Tensor, *, seed: int = 0) -> Outcome:
    """Count correct predictions under one perturbation (1, C, H, W); see :func:`gambeson.victim.predict`."""
    predictions = predict(victim, split, delta.to(victim.device), seed=seed)
    return _counted(*right_answers(predictions, split.labels.cpu(), split.ignore_index), split)


def accuracy_under(victim: Victim, split: Split, attack: ImageAttack, seed: int, batch_size: int = 250) -> Rate:
    """Accuracy under a per-image attack; see :func:`outcome`."""
    return outcome(victim, split, attack, seed, batch_size).rate


def _counted(right: torch.Tensor, answers: torch.Tensor, split: Split) -> Outcome:
    if not bool(answers.any()):
        raise nothing_counts(split)
    return Outcome(right, answers)


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
