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

SLIGHT = 0.02
"""Share of pixels that is no clear difference, however certain it is (ours): of the thousands of pixels of a map, a few
more fall to every step and every start that an attack is given."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of the shares that two attacks on the same images break: of images, or of each map's pixels.

    One answer per image is right or wrong. The shares of right pixels of two maps lie close together, so that what is
    added to keep an interval from being empty is not a whole image there but the largest value that occurred, and the
    interval is widened by :data:`SLIGHT` instead.
    """

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
        unit = float(difference.abs().amax()) if _are_maps(weaker) else 1.0
        n = len(difference) + 2
        mean = float(difference.sum()) / n
        half = CLEAR * sqrt(max(0.0, (float(difference.square().sum()) + unit**2) / n - mean**2) / n)
        half += SLIGHT if _are_maps(weaker) else 0
        return cls(float(difference.mean()), mean - half, mean + half)

    @classmethod
    def across(cls, weaker: Counts, stronger: Counts) -> PairedDifference:
        """Compare outcomes of different images, with an answer of each kind added to both (Agresti and Caffo 2000)."""
        ends = (0.0, 1.0)
        if _are_maps(weaker):
            least, most = torch.cat([weaker.shares, stronger.shares]).aminmax()
            ends = float(least), float(most)
        (mean, scatter), (other, more) = (_padded(found.shares, ends) for found in (weaker, stronger))
        half = CLEAR * sqrt(scatter + more) + (SLIGHT if _are_maps(weaker) else 0)
        value = float(weaker.shares.mean()) - float(stronger.shares.mean())
        return cls(value, mean - other - half, mean - other + half)

    def beyond(self, limit: float = 0.0) -> str:
        """Say whether the difference is clearly more than a limit, with both numbers, as the end of a sentence."""
        return f"{self} more, {'' if self.low > limit else 'not '}clearly above {100 * limit:g} %"

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def _are_maps(counts: Counts) -> bool:
    return int(counts.total.max()) > 1


def _padded(shares: torch.Tensor, ends: tuple[float, float]) -> tuple[float, float]:
    """Return the mean of the shares with one at either end added, and its squared standard error."""
    padded = torch.cat([shares, shares.new_tensor(ends)])
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
