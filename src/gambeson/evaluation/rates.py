"""Rates with confidence intervals, costs, and the records of controls, eps_uni and eps_adv."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from statistics import NormalDist
from typing import Literal

from gambeson.base import Config

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for 95 % intervals."""


class Rate(Config):
    """A share with its 95 % Wilson score interval (Wilson 1927).

    ``n`` is the number of independent units: images with a label that counts. For label maps the share is over all
    labelled pixels, and the interval over images, which is conservative, because the pixels of an image are not
    independent.

    The interval is valid for a single rate fixed beforehand. The highest of k rates on the same images is high in part
    by chance, and its own interval misses the true rate far more often than one time in twenty. :meth:`highest` and
    :meth:`lowest` select one and widen the interval so that all k hold simultaneously (Bonferroni: each at 1 - 0.05 /
    k, for any dependence), hence also the selected one. If all candidates have the same n, it holds for the highest of
    the true rates too.

    The worst case *per image*, such as the accuracy under the worst of several attacks or restarts, needs no such
    correction: it is decided per image by a procedure fixed beforehand, so images remain independent trials and the
    number of correct ones is one binomial count.
    """

    value: float
    """The share, in [0, 1]."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Images behind the share."""
    candidates: int = 1
    """Number of rates on the same images that this one was selected from; the interval holds for all of them at
    once."""

    @classmethod
    def of(cls, hits: int, total: int, n: int | None = None, *, candidates: int = 1) -> Rate:
        """Build a rate from counts.

        Args:
            hits: number of hits.
            total: number of predictions, without ignored pixels.
            n: number of images with a label that counts; by default ``total``, as for one label per image.
            candidates: number of rates on the same images that this one is selected from.
        """
        n = total if n is None else n
        if total == 0 or n == 0:
            return cls(value=0.0, low=0.0, high=1.0, n=0, candidates=candidates)
        return cls._wilson(hits / total, n, candidates)

    @classmethod
    def _wilson(cls, p: float, n: int, candidates: int) -> Rate:
        z = Z95 if candidates == 1 else NormalDist().inv_cdf(1 - 0.025 / candidates)
        scale = 1 / (1 + z**2 / n)
        centre = scale * (p + z**2 / (2 * n))
        half = scale * z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        # At 0 and 1 the formula's end is p itself; rounding must not put the value outside the interval.
        low, high = min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
        return cls(value=p, low=low, high=high, n=n, candidates=candidates)

    def among(self, candidates: int) -> Rate:
        """The same share with the interval of one selected from ``candidates`` rates on the same images."""
        if self.n == 0 or candidates == self.candidates:
            return self.model_copy(update={"candidates": candidates})
        return self._wilson(self.value, self.n, candidates)

    @classmethod
    def highest(cls, rates: Iterable[Rate]) -> Rate:
        """The highest of rates on the same images (the first of equal ones); its interval holds for all at once.

        Candidates of rates that were themselves selected add up.
        """
        rates = list(rates)
        return max(rates, key=lambda rate: rate.value).among(sum(rate.candidates for rate in rates))

    @classmethod
    def lowest(cls, rates: Iterable[Rate]) -> Rate:
        """The lowest of rates on the same images; see :meth:`highest`."""
        rates = list(rates)
        return min(rates, key=lambda rate: rate.value).among(sum(rate.candidates for rate in rates))

    @property
    def complement(self) -> Rate:
        """The complementary share, up to rounding: accuracy from error, error from accuracy."""
        return Rate(value=1 - self.value, low=1 - self.high, high=1 - self.low, n=self.n, candidates=self.candidates)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


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
