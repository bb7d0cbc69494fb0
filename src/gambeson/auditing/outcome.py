"""Paired comparison of two attacks on the same images, and attacks on models with non-finite gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from gambeson.attacks import NonFiniteGradientError
from gambeson.evaluation.outcome import ImageAttack
from gambeson.tasks import Counts, Task
from gambeson.victim import Victim

CLEAR = 3.0
"""Standard errors of a clear difference (ours): chance exceeds them once in 740, so that the many comparisons of an
audit rarely raise a false alarm."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of the shares of images broken by two attacks on the same images."""

    value: float
    low: float
    """:data:`CLEAR` standard errors below."""
    high: float

    @classmethod
    def of(cls, weaker: Counts, stronger: Counts) -> PairedDifference:
        """Compare per image; positive if ``stronger`` breaks more.

        The interval is that of paired proportions with half an image added to each of the four outcomes of a pair
        (Agresti and Min 2005), for shares as well: it is not empty where all pairs agree.
        """
        difference = weaker.shares - stronger.shares
        n = len(difference) + 2
        mean = float(difference.sum()) / n
        half = CLEAR * sqrt(max(0.0, (float(difference.square().sum()) + 1) / n - mean**2) / n)
        return cls(float(difference.mean()), mean - half, mean + half)

    @classmethod
    def across(cls, weaker: Counts, stronger: Counts) -> PairedDifference:
        """Compare outcomes of different images, with an answer of each kind added to both (Agresti and Caffo 2000)."""
        (mean, scatter), (other, more) = (_padded(found.shares) for found in (weaker, stronger))
        half = CLEAR * sqrt(scatter + more)
        value = float(weaker.shares.mean()) - float(stronger.shares.mean())
        return cls(value, mean - other - half, mean - other + half)

    def beyond(self, limit: float = 0.0) -> str:
        """Say whether the difference is clearly more than a limit, with both numbers, as the end of a sentence."""
        return f"{self} more, {'' if self.low > limit else 'not '}clearly above {100 * limit:g} %"

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def _padded(shares: torch.Tensor) -> tuple[float, float]:
    """Return the mean of the shares with a 0 and a 1 added, and its squared standard error."""
    padded = torch.cat([shares, shares.new_tensor([0.0, 1.0])])
    return float(padded.mean()), float(padded.var(correction=0)) / len(padded)


class AsFarAsFinite:
    """An attack that returns its best images so far if a gradient is not finite.

    Args:
        attack: a per-image attack.
    """

    def __init__(self, attack: ImageAttack) -> None:
        self.attack = attack

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images."""
        try:
            return self.attack(model, x, y, seed=seed, task=task)
        except NonFiniteGradientError as error:
            return x if error.found is None else error.found
