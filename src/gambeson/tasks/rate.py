"""A share with its interval. Counts are the state; a rate is computed once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from statistics import NormalDist

import numpy as np
import torch
from pydantic import model_validator

from gambeson.base import Config, UserError, generator

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for 95 % intervals."""
RESAMPLES = 1000
"""Bootstrap samples of the images (ours)."""
TOO_ALIKE = 0.1
"""Share of the variance of independent answers below which images are too alike to tell how far others differ (ours).
Pixels of one map go together, so that real maps differ by far more."""
_COUNTS_AT_ONCE = 2**22


class Rate(Config):
    """A share with its 95 % Wilson score interval (Wilson 1927).

    ``n`` counts independent units: the images that have a label which counts. Label maps have many answers per image,
    and those of one image are not independent: the share is taken over all labelled pixels, its standard error by
    bootstrap over images (:meth:`bootstrap`), and the interval is Wilson's for the *effective* number of independent
    answers, which is what the standard error amounts to (Korn and Graubard 1998).

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
    effective: float | None = None
    """Independent answers that would give the same standard error; None where it is ``n``, one answer per image."""

    @model_validator(mode="after")
    def _share(self) -> Rate:
        if not (0 <= self.value <= 1 and 0 <= self.low <= self.high <= 1 and self.n >= 0):
            interval = f"{self.value:g} [{self.low:g}, {self.high:g}] of {self.n}"
            raise ValueError(f"expected a share of n images and its interval, from 0 to 1; got {interval}")
        return self

    @classmethod
    def of(cls, hits: int, total: int, *, candidates: int = 1) -> Rate:
        """Build a rate from counts of independent answers, one per image; see :meth:`bootstrap` for several.

        Args:
            hits: answers that count.
            total: all answers.
            candidates: rates among which this one was or will be chosen on the same images.
        """
        if total == 0:
            return cls(value=0.0, low=0.0, high=1.0, n=0, candidates=candidates)
        return cls._wilson(hits / total, total, candidates)

    @classmethod
    def bootstrap(cls, hits: torch.Tensor, totals: torch.Tensor, *, seed: int = 0) -> Rate:
        """Build a rate from counts per image: the share of all answers, with an interval over images.

        Images are resampled with all their answers (:data:`RESAMPLES` times) and the standard deviation of the share
        is corrected for the number of images; see :meth:`from_error`. Where no image has more than one answer, the
        answers are independent and the rate is that of :meth:`of`. The order of the images does not matter.

        Args:
            hits: (N,) integers, the answers of each image that count.
            totals: (N,) integers, all answers of each image; an image with none is left out.
            seed: of the resamples.

        Raises:
            UserError: they are not counts of the same images.
        """
        if hits.ndim != 1 or hits.shape != totals.shape or hits.is_floating_point() or totals.is_floating_point():
            raise UserError(
                f"hits are {hits.dtype} {tuple(hits.shape)} and totals {totals.dtype} {tuple(totals.shape)}: expected "
                "integers (N,) of both, one per image"
            )
        return cls.bootstraps(hits[:, None], totals[:, None], seed=seed)[0]

    @classmethod
    def bootstraps(cls, hits: torch.Tensor, totals: torch.Tensor, *, seed: int = 0) -> list[Rate]:
        """Build several rates on the same samples of the images, such as one per class; see :meth:`bootstrap`.

        Args:
            hits: (N, K) integers.
            totals: (N, K) integers; a sample without an answer says nothing of a rate.
            seed: of the resamples.
        """
        hits, totals = (counts.to("cpu", torch.int64) for counts in (hits, totals))
        if bool((hits < 0).any()) or bool((hits > totals).any()):
            raise UserError("an image has more hits than answers, or fewer than none: expected 0 <= hits <= totals")
        some = totals.any(1)
        hits, totals = hits[some], totals[some]
        hit, total, images = hits.sum(0), totals.sum(0), (totals > 0).sum(0)
        if torch.equal(total, images):
            return [cls.of(*counts) for counts in zip(hit.tolist(), total.tolist(), strict=True)]
        # Accuracy and error have one standard error: they are to have the same samples, too.
        rows = torch.cat([torch.where(2 * hit > total, totals - hits, hits), totals], 1)
        right, answered = torch.cat(list(resampled(rows, seed))).chunk(2, 1)
        shares = right / answered
        return [
            cls.of(int(hit[k]), int(total[k]))
            if total[k] == images[k]
            else cls.from_error(
                int(hit[k]) / int(total[k]), shares[answered[:, k] > 0, k], int(images[k]), int(total[k])
            )
            for k in range(len(hit))
        ]

    @classmethod
    def from_error(cls, value: float, draws: torch.Tensor, n: int, answers: int) -> Rate:
        """Build a rate from its bootstrap samples over images.

        The interval is Wilson's, with Student's quantile for n - 1 degrees of freedom, at the effective number of
        answers value (1 - value) / error², at most ``answers``. It stays in [0, 1], is right in the tails that a choice
        among candidates needs, where a thousand samples have no quantiles, and covers better than the percentiles of
        the samples where images are few. A share of 0 or 1, whose samples are all alike, counts as one answer per
        image, and so does the share of one image, whose spread is unknown, and that of images that are far more alike
        than independent answers would be (:data:`TOO_ALIKE`): where none happened to differ, their spread is unknown.

        Args:
            value: the share.
            draws: (B,) float64, the share in each sample.
            n: images behind it.
            answers: all answers.
        """
        if n < 2 or not 0 < value < 1:
            return cls._wilson(value, n, 1)
        variance = float(draws.var()) * n / (n - 1)
        alike = variance < TOO_ALIKE * value * (1 - value) / answers
        return cls.from_variance(value, variance, n, n if alike else answers)

    @classmethod
    def from_variance(cls, value: float, variance: float, n: int, answers: int) -> Rate:
        """Build a rate from the variance of its value; see :meth:`from_error`.

        Args:
            value: the share.
            variance: of its estimate over samples of the images; unknown for a share of 0 or 1.
            n: images behind it, two or more.
            answers: the effective number of answers at the most, and of a share of 0 or 1.
        """
        known = 0 < value < 1
        effective = min(float(answers), value * (1 - value) / max(variance, 1e-300)) if known else float(answers)
        return cls._wilson(value, n, 1, effective)

    @classmethod
    def _wilson(cls, p: float, n: int, candidates: int, effective: float | None = None) -> Rate:
        z = Z95 if candidates == 1 else NormalDist().inv_cdf(1 - 0.025 / candidates)
        m: float = n
        if effective is not None:
            z, m = _student(n, candidates), effective
        scale = 1 / (1 + z**2 / m)
        centre = scale * (p + z**2 / (2 * m))
        half = scale * z * sqrt(p * (1 - p) / m + z**2 / (4 * m**2))
        # At 0 and 1 the formula's end is p itself; rounding must not put the value outside its own interval.
        low, high = min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
        return cls(value=p, low=low, high=high, n=n, candidates=candidates, effective=effective)

    def among(self, candidates: int) -> Rate:
        """The same share with the interval of one that was chosen among so many on the same images."""
        if self.n == 0 or candidates == self.candidates:
            return self.model_copy(update={"candidates": candidates})
        return self._wilson(self.value, self.n, candidates, self.effective)

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
        return self.model_copy(update={"value": 1 - self.value, "low": 1 - self.high, "high": 1 - self.low})

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Difference(Config):
    """A paired difference of two shares on the same images, with its 95 % interval over images."""

    value: float
    """The first share minus the second, in [-1, 1]."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Images with a label that counts."""

    @classmethod
    def of(
        cls,
        first: torch.Tensor,
        second: torch.Tensor,
        share: Callable[[torch.Tensor], torch.Tensor],
        n: int,
        *,
        seed: int = 0,
    ) -> Difference:
        """Subtract what is computed from the sums over images, with images resampled in pairs.

        The interval is the value and Student's quantile for n - 1 degrees of freedom times the bootstrap's standard
        error, which is nothing where all images differ alike. No end is therefore nearer than if the share of images
        that n images may all have missed (:meth:`Rate.of`) differed by the most that any does; where none does the
        value is exactly 0, and they may differ in everything. Images with one answer each have the interval of
        :meth:`of_pairs`; for a single image it is everything.

        Args:
            first: (N, F) integers per image.
            second: (N, F), of the same images.
            share: maps sums (B, F) float64 to shares (B,).
            n: images with a label that counts.
            seed: of the resamples.
        """
        value = _between(first, second, share)
        if n < 2:
            return cls(value=value, low=-1, high=1, n=n)
        apart = share(first.double()) - share(second.double())
        differ = bool((first != second).any())
        won, lost = int((apart == 1).sum()), int((apart == -1).sum())
        if differ and won + lost == int((apart != 0).sum()) and abs(value - (won - lost) / n) < 1e-9:
            return cls.of_pairs(won, lost, n)
        half = Rate.of(0, n).high * (float(apart.abs().max()) if differ else 1.0)
        if differ:
            sums = resampled(torch.cat([first, second], 1), seed)
            draws = torch.cat([torch.sub(*(share(part) for part in both.chunk(2, 1))) for both in sums])
            half = max(half, _student(n, 1) * float(draws.std()) * sqrt(n / (n - 1)))
        return cls(value=value, low=max(-1.0, value - half), high=min(1.0, value + half), n=n)

    @classmethod
    def of_pairs(cls, first: int, second: int, n: int) -> Difference:
        """Compare n images that have one answer each, with half an image added to each of the four outcomes of a pair.

        The interval is that of Agresti and Min (2005), which has a width where all images differ alike.

        Args:
            first: images that count in the first share alone.
            second: images that count in the second alone.
            n: images, one or more.
        """
        mean = (first - second) / (n + 2)
        half = Z95 * sqrt(((first + second + 1) / (n + 2) - mean**2) / (n + 2))
        return cls(value=(first - second) / n, low=max(-1.0, mean - half), high=min(1.0, mean + half), n=n)

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def _between(first: torch.Tensor, second: torch.Tensor, share: Callable[[torch.Tensor], torch.Tensor]) -> float:
    return float(share(first.sum(0)[None].double()) - share(second.sum(0)[None].double()))


def _student(n: int, candidates: int) -> float:
    """Quantile of Student's distribution for n images and a 95 % interval that holds for all candidates."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - 0.025 / candidates))


def resampled(
    rows: torch.Tensor, seed: int, resamples: int = RESAMPLES, *, ordered: bool = False
) -> Iterator[torch.Tensor]:
    """Sum the rows of resampled images: the bootstrap over images (Efron 1979), a few samples at a time.

    Args:
        rows: (N, F) integers per image.
        seed: of the samples.
        resamples: number of samples.
        ordered: take the images as they stand; by default they are sorted by their rows first, so that the same images
            in another order give the same samples.

    Yields:
        (B, F) float64, exact below 2^53.
    """
    images, draw = len(rows), generator(seed, "bootstrap")
    if not ordered:
        rows = rows[torch.from_numpy(np.lexsort(rows.T.numpy()[::-1]))]
    values = rows.double()
    size = max(1, _COUNTS_AT_ONCE // max(1, images))
    for begin in range(0, resamples, size):
        picks = torch.randint(images, (min(size, resamples - begin), images), generator=draw)
        counts = torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(1, picks, torch.ones(picks.shape).double())
        yield counts @ values
