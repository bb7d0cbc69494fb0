"""A share with its interval. Counts are the state; a rate is computed once, at the end."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from statistics import NormalDist

from gambeson.base import Config

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for 95 % intervals."""


class Rate(Config):
    """A share with its 95 % Wilson score interval (Wilson 1927).

    ``n`` counts independent units: the images that have a label which counts. Label maps have many answers per
    image; their share is taken over all labelled pixels, and the interval over images, which is the cautious choice
    since the pixels of one image are not independent.

    One interval holds for one number that was fixed before the images were looked at. The highest of k rates that
    were counted on the same images was not: it is high in part by chance, and its own interval misses the true rate
    far more often than one time in twenty. :meth:`highest` and :meth:`lowest` choose, and widen the interval so that
    all k hold at once (Bonferroni: each at 1 - 0.05 / k, whatever the dependence between them), hence also the chosen
    one. Where all candidates have the same n, it holds for the highest of the true rates too.

    No such correction is due to the worst case *per image*, such as the accuracy under the worst of several attacks
    or restarts: what is right there is decided for each image by itself, by a procedure fixed in advance, so that the
    images remain independent trials and their number right is one binomial count.
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
    """Rates among which this one was chosen on the same images; the interval holds for all of them at once."""

    @classmethod
    def of(cls, hits: int, total: int, n: int | None = None, *, candidates: int = 1) -> Rate:
        """Build a rate from counts.

        Args:
            hits: answers that count.
            total: all answers (pixels with the ignore index left out).
            n: images behind them, those left out that have no label which counts; ``total`` unless labels are maps.
            candidates: rates among which this one was or will be chosen on the same images.
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
        # At 0 and 1 the formula's end is p itself; rounding must not put the value outside its own interval.
        low, high = min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
        return cls(value=p, low=low, high=high, n=n, candidates=candidates)

    def among(self, candidates: int) -> Rate:
        """The same share with the interval of one that was chosen among so many on the same images."""
        if self.n == 0 or candidates == self.candidates:
            return self.model_copy(update={"candidates": candidates})
        return self._wilson(self.value, self.n, candidates)

    @classmethod
    def highest(cls, rates: Iterable[Rate]) -> Rate:
        """The highest of rates on the same images, the first where several are; its interval holds for all at once.

        A rate that was itself chosen among several brings its own candidates along.
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
        """The share of the other answer, up to rounding: accuracy from error, error from accuracy."""
        return Rate(value=1 - self.value, low=1 - self.high, high=1 - self.low, n=self.n, candidates=self.candidates)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
