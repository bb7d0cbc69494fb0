"""Rates with intervals. Counts are the state; a rate is computed once, at the end."""

from __future__ import annotations

from math import sqrt

from gambeson.base import Config

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for 95 % intervals."""


class Rate(Config):
    """A share with its 95 % Wilson score interval (Wilson 1927).

    ``n`` counts independent units, that is images. Labels that are maps have many answers an image; their
    share is taken over all labelled pixels, and the interval over images, which is the cautious choice since
    the pixels of one image are not independent.
    """

    value: float
    """The share, in [0, 1]."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Images behind the share."""

    @classmethod
    def of(cls, hits: int, total: int, n: int | None = None) -> Rate:
        """Build a rate from counts.

        Args:
            hits: answers that count.
            total: all answers (pixels with the ignore index left out).
            n: images behind them; ``total`` unless labels are maps.
        """
        n = total if n is None else n
        if total == 0 or n == 0:
            return cls(value=0.0, low=0.0, high=1.0, n=0)
        p = hits / total
        scale = 1 / (1 + Z95**2 / n)
        centre = scale * (p + Z95**2 / (2 * n))
        half = scale * Z95 * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        # At 0 and 1 the formula's end is p itself; rounding must not put the value outside its own interval.
        return cls(value=p, low=min(p, max(0.0, centre - half)), high=max(p, min(1.0, centre + half)), n=n)

    @property
    def complement(self) -> Rate:
        """The share of the other answer, up to rounding: accuracy from error, error from accuracy."""
        return Rate(value=1 - self.value, low=1 - self.high, high=1 - self.low, n=self.n)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
