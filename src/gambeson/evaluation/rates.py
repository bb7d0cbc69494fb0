"""Rates and smallest radii that evaluations report, their bootstrap intervals, and the work that they took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from gambeson.base import Config
from gambeson.tasks import Confusion, Rate
from gambeson.tasks.rate import RESAMPLES, resampled


class Cost(Config):
    """Cost of a number, counted in images."""

    forwards: int = 0
    """Images sent forward through the model."""
    backwards: int = 0
    """Images whose gradient was taken."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(forwards=self.forwards + other.forwards, backwards=self.backwards + other.backwards)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(forwards=self.forwards - other.forwards, backwards=self.backwards - other.backwards)


class Control(Config):
    """The effect of a control, which a crafted perturbation has to exceed."""

    name: str
    """One of :data:`gambeson.attacks.CONTROLS`, :data:`gambeson.attacks.MORE_CONTROLS` and, of patches,
    :data:`gambeson.attacks.PATCH_CONTROLS`."""
    mean: float
    """Mean UER over the draws."""
    worst: Rate
    """UER of the worst draw; its interval holds for all draws at once."""
    draws: int
    """Number of patterns."""

    @classmethod
    def of(cls, name: str, rates: Sequence[Rate]) -> Control:
        """Return the control of which each pattern has one of the rates."""
        mean = sum(rate.value for rate in rates) / len(rates)
        return cls(name=name, mean=mean, worst=Rate.highest(rates), draws=len(rates))


def strongest_control(controls: Iterable[Control]) -> Control | None:
    """Return the control whose worst draw did most harm, the first of several; None where there is none.

    The interval of its rate holds for all draws of all of them at once.
    """
    tried = list(controls)
    if not tried:
        return None
    first = max(tried, key=lambda one: one.worst.value)
    return first.model_copy(update={"worst": Rate.highest(one.worst for one in tried)})


class SmallestEps(Config):
    """The smallest eps at which an attack reached the error ``delta``.

    It is an upper bound of the true value.
    """

    delta: float
    measure: str = "error"
    """What reaches ``delta``: see :func:`gambeson.evaluation.eps_uni`."""
    value: float
    """The smallest success, in pixel units; the largest eps tried if ``censored``."""
    low: float | None = None
    """Lower end of the 95 % interval over test images (:func:`gambeson.evaluation.rates.crossing_interval`); None
    in results without one."""
    high: float | None = None
    """Upper end; None if too few resamples reach ``delta``."""
    censored: bool
    """Whether there is no success up to ``value``."""
    tolerance: float
    """Width of the last bracket."""
    tried: list[tuple[float, float]]
    """Every (eps, error) of the search, in order of eps."""
    split: Literal["validation", "test"]
    """The split whose error is reported."""
    cost: Cost

    @property
    def interval(self) -> str:
        """The interval as text with a leading space, `` [0.0312, 0.0341]``; empty if none or if it adds nothing."""
        if self.low is None or (self.censored and self.low == self.value):
            return ""
        return f" [{self.low:.3g} or more]" if self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"


class EpsUni(SmallestEps):
    """eps_uni(delta) (Mummadi et al. 2019, section 3): for universal perturbations."""


class EpsAdv(SmallestEps):
    """eps_adv(delta), for per-image perturbations; below eps_uni(delta)."""

    images: int
    """Test images with a label that counts."""


class Measured(Protocol):
    """Counts of each image under one attack, and a share that is computed from their sum and grows with eps."""

    @property
    def rows(self) -> torch.Tensor:
        """(N, F) int64: the counts."""
        ...

    def of_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the share for each row of sums over images, (B, F) float64."""
        ...

    @property
    def error(self) -> float:
        """The share for these images."""
        ...

    @property
    def images(self) -> int:
        """Images with anything that counts."""
        ...


@dataclass(frozen=True)
class LostIou:
    """One minus the mean IoU under one attack."""

    confusion: Confusion

    @property
    def error(self) -> float:
        """One minus the mean IoU."""
        return 1 - self.confusion.value("mean_iou")

    @property
    def images(self) -> int:
        """Images with a label that counts."""
        return int(self.confusion.counts[:, 1].any(1).sum())

    @property
    def rows(self) -> torch.Tensor:
        """(N, 3 K): the confusion counts."""
        return self.confusion.counts.flatten(1)

    def of_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """Return one minus the mean IoU for each row of sums, (B, 3 K)."""
        return 1 - self.confusion.of_sums("mean_iou", sums)


def crossing_interval(
    curve: Mapping[float, Measured], delta: float, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float | None]:
    """95 % interval of the eps at which the error reaches ``delta``: percentile bootstrap over images (Efron 1979).

    The perturbations of the curve are held fixed, since they were selected without the resampled images. In each
    resample the curve is made monotone (an attack at one eps is valid at every larger one) and is linear between the
    eps tried; the eps at which it crosses ``delta`` is collected. Images without a label that counts are left out.

    Args:
        curve: the counts of the same images by eps; 0 stands for clean images.
        delta: the error to reach.
        seed: of the resamples.
        resamples: number of resamples.

    Returns:
        The 2.5 % and the 97.5 % quantile. If too few resamples reach ``delta``, the upper end is None, or the lower end
        the largest eps.
    """
    radii = sorted(curve)
    steps = torch.tensor(radii, dtype=torch.float64)
    rows, found = torch.cat([curve[eps].rows for eps in radii], 1), []
    for sums in resampled(rows[rows.any(1)], seed, resamples, ordered=True):
        parts = zip(radii, sums.chunk(len(radii), 1), strict=True)
        found.append(crossings(steps, torch.stack([curve[eps].of_sums(part) for eps, part in parts], 1), delta))
    ordered = torch.cat(found).sort().values
    tail = int(0.025 * resamples)
    low, high = float(ordered[tail]), float(ordered[resamples - 1 - tail])
    return low if math.isfinite(low) else radii[-1], high if math.isfinite(high) else None


def crossings(radii: torch.Tensor, errors: torch.Tensor, delta: float) -> torch.Tensor:
    """Return the eps at which each curve first reaches ``delta``, infinite if it does not.

    Args:
        radii: (M,), ascending.
        errors: (B, M), one curve per row, linear between the radii.
        delta: the error.
    """
    rising = errors.cummax(1).values
    reached = rising >= delta
    at = reached.to(torch.int8).argmax(1)
    before = (at - 1).clamp(min=0)
    rows = torch.arange(len(errors))
    below, above = rising[rows, before], rising[rows, at]
    share = ((delta - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    there = torch.where(at == 0, radii[at], radii[before] + share * (radii[at] - radii[before]))
    return torch.where(reached.any(1), there, torch.inf)
