"""Paired comparison of two attacks on the same images at one level for all, and attacks with non-finite gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import torch

from gambeson.attacks import GradientAttack, NonFiniteGradientError
from gambeson.base import derive
from gambeson.evaluation.outcome import ImageAttack
from gambeson.tasks import CLASSIFICATION, Counts, Rate, Task
from gambeson.victim import Victim, vote

FAMILY = 0.05
"""Largest probability that an audit fails any comparison by chance: the family-wise error (ours)."""
COMPARISONS = 62
"""Comparisons of attacks that an audit makes at most, over all diagnostics (``comparisons`` of each, a test counts)."""
LEVEL = FAMILY / COMPARISONS
"""Probability with which one comparison may fail by chance (Bonferroni, whatever the dependence between them)."""
EARLY = 0.1
"""Share of :data:`LEVEL` that a first look at the sample spends; the rest is for a second look at more images."""
POWER = 0.8
"""Probability with which the effect that a check states would have been found."""

SLIGHT = 0.02
"""Share of pixels that is no clear difference, however certain it is (ours): of the thousands of pixels of a map, a few
more fall to every step and every start that an attack is given."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of the shares that two attacks on the same images break: of images, or of each map's pixels.

    Each end of the interval holds with probability 1 - ``level`` of :meth:`of`. Of one answer per image, the lower end
    is above 0 exactly where the sign test of the images that only one of the two breaks rejects (exact McNemar test).

    The shares of right pixels of two maps lie close together: an interval of their mean difference by Student's
    quantile, with the largest difference added once, which is widened by :data:`SLIGHT`.
    """

    value: float
    low: float
    """Lower confidence limit."""
    high: float
    """Upper confidence limit."""
    images: int
    """Images that were compared."""
    looks: tuple[int, ...] = ()
    """Images of each look that may be taken, if there are several (:meth:`AuditContext.compare`)."""
    spread: float | None = None
    """Standard error; of label maps alone."""

    @classmethod
    def of(cls, weaker: Counts, stronger: Counts, *, level: float = LEVEL) -> PairedDifference:
        """Compare per image; positive if ``stronger`` breaks more.

        Of one answer per image, the interval combines the Clopper-Pearson limits of the two shares of images that one
        attack alone breaks (hybrid interval for paired proportions, Newcombe 1998, method 10), and the sign test
        decides on 0. For every share a test finds its error below ``level`` by enumeration.

        Args:
            weaker: outcome of one attack.
            stronger: outcome of the other, on the same images.
            level: error of each end.
        """
        difference = weaker.shares - stronger.shares
        n = len(difference)
        if not _are_maps(weaker):
            won, lost = int((difference > 0).sum()), int((difference < 0).sum())
            low, high = _low(won, lost, n, level), -_low(lost, won, n, level)
            return cls((won - lost) / max(1, n), low, high, n)
        padded = torch.cat([difference, difference.new_tensor([1.0, -1.0]) * difference.abs().amax()])
        error = float(padded.std(correction=0)) / sqrt(len(padded))
        return cls._of_maps(float(difference.mean()), float(padded.mean()), error, n, level)

    @classmethod
    def across(cls, weaker: Counts, stronger: Counts, *, level: float = LEVEL) -> PairedDifference:
        """Compare outcomes of different images; the interval is as in :meth:`of`, of independent shares."""
        value = float(weaker.shares.mean()) - float(stronger.shares.mean())
        n = min(weaker.images, stronger.images)
        if not _are_maps(weaker):
            (a, m), (b, k) = ((int(one.right.sum()), one.images) for one in (weaker, stronger))
            low = value - sqrt((a / m - _least(a, m, level)) ** 2 + (_most(b, k, level) - b / k) ** 2)
            high = value + sqrt((_most(a, m, level) - a / m) ** 2 + (b / k - _least(b, k, level)) ** 2)
            return cls(value, low, high, n)
        ends = torch.stack(torch.cat([weaker.shares, stronger.shares]).aminmax())
        both = [torch.cat([one.shares, ends]) for one in (weaker, stronger)]
        error = sqrt(sum(float(one.var(correction=0)) / len(one) for one in both))
        return cls._of_maps(value, float(both[0].mean() - both[1].mean()), error, n, level)

    @classmethod
    def _of_maps(cls, value: float, middle: float, error: float, n: int, level: float) -> PairedDifference:
        from scipy.special import stdtrit

        half = float(stdtrit(max(1, n - 1), 1 - level)) * error + SLIGHT
        return cls(value, middle - half, middle + half, n, spread=error)

    def over(self, looks: tuple[int, ...]) -> PairedDifference:
        """The same difference, as the end of a procedure of several looks."""
        return replace(self, looks=looks)

    def findable(self, limit: float = 0.0) -> float:
        """Return the smallest true difference that is found to be above ``limit`` with probability :data:`POWER`.

        Of one answer per image, at :data:`LEVEL`, and if whatever the weaker attack breaks falls to the stronger one
        as well.
        """
        if self.spread is not None:
            return limit + (self.high - self.low) / 2 + NormalDist().inv_cdf(POWER) * self.spread
        return smallest_effect(self.looks or (self.images,), limit)

    def beyond(self, limit: float = 0.0) -> str:
        """Say whether the difference is clearly more than a limit, with both numbers, as the end of a sentence."""
        if self.low > limit:
            return f"{self} more of {self.images} images, clearly above {100 * limit:g} %"
        found = self.findable(limit)
        power = f"{100 * found:.1f} % would be" if found < 1 else "nothing would be"
        fewer = replace(self, value=-self.value, low=-self.high, high=-self.low)
        said = f"{self} more" if self.value >= 0 else f"{fewer} fewer"
        return (
            f"{said} of {self.images} images, not clearly above {100 * limit:g} % ({power}, with "
            f"{100 * POWER:g} % power)"
        )

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def clearly_more(hits: int, total: int, share: float) -> bool:
    """Whether so many of ``total`` say that more than a share do: the exact binomial test at :data:`LEVEL`."""
    from scipy.special import bdtrc

    return hits > 0 and float(bdtrc(hits - 1, total, share)) < LEVEL


def lower_end(rate: Rate) -> float:
    """Return the lower confidence limit of a rate at the level of an audit's comparisons.

    Clopper-Pearson's for one answer per image; for label maps, Wilson's of the effective number of answers.
    """
    if rate.effective is not None:
        return rate.among(max(1, round(0.025 / LEVEL))).low
    return _least(round(rate.value * rate.n), rate.n, LEVEL)


def smallest_effect(looks: tuple[int, ...], limit: float) -> float:
    """Return the smallest share of images that is found to be above ``limit`` with probability :data:`POWER`.

    Args:
        looks: images of the only look, or of the first and the second one (:meth:`AuditContext.compare`).
        limit: share that counts as none.

    Returns:
        The share, in [0, 1]; 1 if there are too few images to find anything.
    """
    from scipy.special import bdtrc

    first, last = looks[0], looks[-1]
    early, late = (LEVEL, LEVEL) if len(looks) == 1 else (EARLY * LEVEL, (1 - EARLY) * LEVEL)
    clear, needed = _needed(first, limit, early), _needed(last, limit, late)
    asking = range(int(limit * first) + 1, clear) if len(looks) > 1 else ()  # hits that ask for the second look

    def power(share: float) -> float:
        found = float(bdtrc(clear - 1, first, share)) if clear <= first else 0.0
        for hits in asking:
            exactly = bdtrc(hits - 1, first, share) - bdtrc(hits, first, share)
            found += float(exactly * bdtrc(max(-1, needed - 1 - hits), last - first, share))
        return found

    low, high = limit, 1.0
    if needed > last or power(1 - 1e-9) < POWER:
        return 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def findable_share(n: int, limit: float) -> float:
    """Return the smallest true share of n images that is found to be above ``limit`` with probability :data:`POWER`.

    Returns:
        The share, in [0, 1]; 1 if there are too few images to find anything.
    """
    from scipy.special import betaincinv

    hits = next((hits for hits in range(1, n + 1) if _least(hits, n, LEVEL) > limit), None)
    return 1.0 if hits is None else float(betaincinv(hits, n - hits + 1, POWER))


def _needed(n: int, limit: float, level: float) -> int:
    """Return how many images of n only the stronger attack must break, and the weaker none alone; n + 1: no number."""
    low, high = 1, n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _low(middle, 0, n, level) > limit else (middle + 1, high)
    return low


def _low(won: int, lost: int, n: int, level: float) -> float:
    """Return the lower limit of the difference of two shares of the same n images."""
    from scipy.special import bdtrc

    if n == 0:
        return -1.0
    p, q = won / n, lost / n
    down, up = p - _least(won, n, level), _most(lost, n, level) - q
    together = min(1.0, sqrt(p * q / ((1 - p) * (1 - q)))) if won and lost else 0.0  # an image is in one of the two
    low = p - q - sqrt(down**2 + up**2 + 2 * together * down * up)
    rejected = won > lost and float(bdtrc(won - 1, won + lost, 0.5)) <= level
    return low if rejected else min(low, 0.0)


def _least(hits: int, n: int, level: float) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(hits, n - hits + 1, level)) if hits else 0.0


def _most(hits: int, n: int, level: float) -> float:
    return 1 - _least(n - hits, n, level)


def _are_maps(counts: Counts) -> bool:
    return int(counts.total.max()) > 1


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


class InTurn:
    """Attacks in turn as one: each is run on the images that those before it leave right.

    Args:
        *attacks: per-image attacks with the same ``eps`` and ``norm``, on a model that is not random.
    """

    def __init__(self, *attacks: GradientAttack) -> None:
        self.attacks, self.eps, self.norm = attacks, attacks[0].eps, attacks[0].norm

    def __repr__(self) -> str:
        return f"InTurn{self.attacks}"

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images."""
        moved, rows = x.clone(), torch.arange(len(x), device=x.device)
        for k, attack in enumerate(self.attacks):
            if k:
                rows = rows[CLASSIFICATION.counts(vote(model, moved[rows]), y[rows]).right > 0]
            if len(rows) == 0:
                break
            moved[rows] = AsFarAsFinite(attack)(model, x[rows], y[rows], seed=derive(seed, "turn", k), task=task)
        return moved
