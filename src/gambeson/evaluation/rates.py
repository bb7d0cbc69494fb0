"""Work that a number took, and the rates and smallest radii that evaluations report."""

from __future__ import annotations

from typing import Literal

from gambeson.base import Config
from gambeson.tasks import Rate


class Cost(Config):
    """Cost of a number, counted in images."""

    forwards: int = 0
    """Images sent forward through the model."""
    backwards: int = 0
    """Images whose gradient was taken."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(forwards=self.forwards + other.forwards, backwards=self.backwards + other.backwards)


class Control(Config):
    """The effect of a control, which a crafted perturbation has to exceed."""

    name: str
    """One of :data:`gambeson.attacks.CONTROLS` and :data:`gambeson.attacks.MORE_CONTROLS`."""
    mean: float
    """Mean UER over the draws."""
    worst: Rate
    """UER of the worst draw; its interval holds for all draws at once."""
    draws: int
    """Number of patterns."""


class SmallestEps(Config):
    """The smallest eps at which an attack reached the error ``delta``.

    It is an upper bound of the true value.
    """

    delta: float
    value: float
    """The smallest success, in pixel units; the largest eps tried if ``censored``."""
    low: float | None = None
    """Lower end of the 95 % interval over test images (:func:`gambeson.evaluation.bootstrap.crossing_interval`); None
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
        """The interval as text with a leading space, `` [0.0312, 0.0341]``; empty if there is none."""
        if self.low is None:
            return ""
        return f" [{self.low:.3g}, {'more' if self.high is None else f'{self.high:.3g}'}]"


class EpsUni(SmallestEps):
    """eps_uni(delta) (Mummadi et al. 2019, section 3): for universal perturbations."""


class EpsAdv(SmallestEps):
    """eps_adv(delta), for per-image perturbations; below eps_uni(delta)."""

    images: int
    """Number of test images attacked."""
