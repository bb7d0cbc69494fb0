"""What an attack leaves right, image by image, so that two attacks can be compared on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from gambeson.attacks import GradientAttack, NotFinite
from gambeson.base import derive
from gambeson.data import Split
from gambeson.evaluation import Rate
from gambeson.evaluation.cascade import ImageAttack
from gambeson.evaluation.universal import DRAWS, at_once
from gambeson.victim import Victim, predict, vote

CLEAR = 3.0
"""Standard errors that make a difference clear: chance alone passes them once in 740, so that the many comparisons of
one audit seldom cry wolf. Ours."""


@dataclass(frozen=True)
class Outcome:
    """Right answers of each image under one attack; on label maps an image has many."""

    right: torch.Tensor
    """(N,): answers that are still right."""
    answers: torch.Tensor
    """(N,): answers that count; 1 where an image has one label."""

    @property
    def rate(self) -> Rate:
        """Accuracy, with its interval over images."""
        return Rate.of(int(self.right.sum()), int(self.answers.sum()), len(self.right))

    @property
    def shares(self) -> torch.Tensor:
        """(N,) float64: the share of each image's answers that is right."""
        return self.right.double() / self.answers.clamp(min=1)


@dataclass(frozen=True)
class Gain:
    """How much more of the same images one attack breaks than another, in shares of answers."""

    value: float
    low: float
    """:data:`CLEAR` standard errors below."""
    high: float

    @classmethod
    def of(cls, weaker: Outcome, stronger: Outcome) -> Gain:
        """Compare image by image: above 0 where ``stronger`` breaks more.

        The interval is that of paired proportions with half an image added to each of the four outcomes of a pair
        (Agresti and Min 2005), for shares as well: it is not empty where all pairs agree.
        """
        difference = weaker.shares - stronger.shares
        n = len(difference) + 2
        mean = float(difference.sum()) / n
        half = CLEAR * sqrt(max(0.0, (float(difference.square().sum()) + 1) / n - mean**2) / n)
        return cls(float(difference.mean()), mean - half, mean + half)

    @classmethod
    def across(cls, weaker: Outcome, stronger: Outcome) -> Gain:
        """Compare outcomes of different images, with an answer of each kind added to both (Agresti and Caffo 2000)."""
        (mean, scatter), (other, more) = (_padded(found.shares) for found in (weaker, stronger))
        half = CLEAR * sqrt(scatter + more)
        value = float(weaker.shares.mean()) - float(stronger.shares.mean())
        return cls(value, mean - other - half, mean - other + half)

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def _padded(shares: torch.Tensor) -> tuple[float, float]:
    """Return the mean of the shares with a 0 and a 1 added, and its squared standard error."""
    padded = torch.cat([shares, shares.new_tensor([0.0, 1.0])])
    return float(padded.mean()), float(padded.var(correction=0)) / len(padded)


def under(victim: Victim, split: Split, delta: torch.Tensor) -> Outcome:
    """Count what one perturbation (1, C, H, W) leaves right of a split, as the universal numbers are scored."""
    labels = split.labels.cpu()
    right = predict(victim, split, delta.to(victim.device)) == labels
    valid = torch.ones_like(right) if split.ignore_index is None else labels != split.ignore_index
    return Outcome((right & valid).view(len(labels), -1).sum(1), valid.view(len(labels), -1).sum(1))


def outcome(victim: Victim, split: Split, attack: ImageAttack, seed: int, batch_size: int = 250) -> Outcome:
    """Attack every image and count on the images that came back, as ``accuracy_under`` does.

    The majority of the victim's ``passes`` decides.

    Args:
        victim: the model, met before.
        split: the images.
        attack: see :func:`attacked`.
        seed: of the attack.
        batch_size: images at a time.
    """
    right, answers = [], []
    for k, (images, labels) in enumerate(split.batches(at_once(split, batch_size), device=victim.device)):
        moved = attacked(victim, attack, images, labels, derive(seed, "batch", k), split.ignore_index)
        correct = vote(victim, moved) == labels
        valid = torch.ones_like(correct) if split.ignore_index is None else labels != split.ignore_index
        right.append((correct & valid).view(len(images), -1).sum(1))
        answers.append(valid.view(len(images), -1).sum(1))
    return Outcome(torch.cat(right).cpu(), torch.cat(answers).cpu())


def attacked(
    victim: Victim,
    attack: ImageAttack,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    ignore_index: int | None,
) -> torch.Tensor:
    """Return the images that an attack makes.

    On a random model a gradient attack averages over :data:`DRAWS` draws where it does not say otherwise. Where a
    gradient is not finite, the images are what the attack had found until then.
    """
    if isinstance(attack, GradientAttack) and attack.draws is None and victim.meet(images, scores=True).stochastic:
        attack = attack.model_copy(update={"draws": DRAWS})
    try:
        return attack(victim, images, labels, seed=seed, ignore_index=ignore_index)
    except NotFinite as error:
        return images if error.found is None else error.found
