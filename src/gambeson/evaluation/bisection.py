"""The smallest eps at which an attack reaches an error: doubled until it does, then halved, then read off between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from gambeson.base import UserError, task
from gambeson.evaluation.rates import Measured, crossing_interval

_FIRST = 4 / 255
"""The first eps tried if nothing is known."""
FLOOR = 1e-6
"""Minimum width of the bracket as a share of the largest possible eps (1 in the norm inf), where the rounding of
float32 pixels begins to matter (ours)."""
_NEIGHBOURS = 6
"""Maximum number of rescalings of the perturbation found on each side of eps_uni, at increasing distance, and of
doublings and of halvings by rescaled ones: 24 scores in all, which a budget counts on."""
_FAR = 4.0
"""Distance of the error curve from delta, in standard errors, that suffices for the bootstrap."""


FoundT = TypeVar("FoundT")


@dataclass(kw_only=True)
class Bisection(Generic[FoundT]):
    """One search.

    Args:
        attempt: attacks at an eps, with all that was found so far by eps.
        errors: of what was found, on test.
        rescale: errors under a perturbation scaled to another eps.
        clean: of clean test images.
        largest: the eps at which the ball contains the whole box.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        tried: what is known by eps; what is found is added.
        runs: maximum number of attempts.
        seed: of the interval.
        title: of the progress.
    """

    attempt: Callable[[float, Mapping[float, FoundT]], FoundT]
    errors: Callable[[FoundT], Measured]
    rescale: Callable[[FoundT, float], Measured]
    clean: Measured
    largest: float
    delta: float
    tolerance: float
    tried: dict[float, FoundT]
    runs: float
    seed: int
    title: str

    def run(self) -> dict[str, object]:
        """Search, and return the fields of the result."""
        if not 0 < self.delta < 1:
            raise UserError(f"delta = {self.delta:g}: expected an error between 0 and 1, such as 0.5")
        probing = self.runs > 0
        low, high = (0.0, 0.0) if self.clean.error >= self.delta else self._bracket()
        with task(self.title, self._halvings(low, high)) as advance:
            while math.isfinite(high) and high - low > self._width(high) and self.runs > 0:
                middle = (low + high) / 2
                low, high = (low, middle) if self._succeeds(middle) else (middle, high)
                advance()
        curve = {0.0: self.clean} | {eps: self.errors(found) for eps, found in self.tried.items()}
        if probing and high > 0:
            curve |= self._between(low, high)
            if reached := [eps for eps, found in curve.items() if found.error >= self.delta]:
                known, near = (high, high) if math.isfinite(high) else (low, min(reached))
                curve = self._neighbours(self.tried[known], near) | curve
                high = min(eps for eps, found in curve.items() if found.error >= self.delta)
                low = max(eps for eps in curve if eps < high)
        value = high if math.isfinite(high) else low
        ends = crossing_interval(curve, self.delta, seed=self.seed)
        return {
            "delta": self.delta,
            "value": value,
            "low": min(ends[0], value),
            "high": ends[1] if ends[1] is None or not math.isfinite(high) else max(ends[1], value),
            "censored": not math.isfinite(high),
            "tolerance": high - low if math.isfinite(high) else 0.0,
            "tried": sorted((eps, found.error) for eps, found in curve.items() if eps > 0),
            "split": "test",
        }

    def _bracket(self) -> tuple[float, float]:
        """Return the largest eps known to fail and the smallest known to succeed (infinite if none)."""
        while (high := self._smallest_success()) == math.inf and self._reach() < self.largest and self.runs > 0:
            self._succeeds(min(self.largest, max(_FIRST, 2 * self._reach())))
        low = max((eps for eps in self.tried if eps < high), default=0.0)
        return low, high

    def _succeeds(self, eps: float) -> bool:
        """Attack at ``eps`` and return whether the error reaches delta."""
        self.runs -= 1
        self.tried[eps] = self.attempt(eps, self.tried)
        return self.errors(self.tried[eps]).error >= self.delta

    def _neighbours(self, found: FoundT, eps: float) -> dict[float, Measured]:
        """Errors under the perturbation found at ``eps``, scaled until the error is far from delta."""
        far = _FAR * math.sqrt(self.delta * (1 - self.delta) / max(1, self.clean.images))
        step, curve = min(0.05, max(0.01, self.tolerance)), {}
        for side in (-1, 1):
            for k in range(_NEIGHBOURS):
                near = min(self.largest, eps * (1 + side * step * 2**k))
                if near <= 0 or near == eps:
                    break
                curve[near] = self.rescale(found, near)
                if side * (curve[near].error - self.delta) > far:
                    break
        return curve

    def _between(self, low: float, high: float) -> dict[float, Measured]:
        """Errors inside a bracket that the runs have left wide, of the perturbations at its ends, scaled."""
        ends, curve = [self.tried[eps] for eps in (low, high) if eps in self.tried], dict[float, Measured]()

        def succeeds(eps: float) -> bool:
            curve[eps] = max((self.rescale(end, eps) for end in ends), key=lambda one: one.error)
            return curve[eps].error >= self.delta

        for _ in range(_NEIGHBOURS if ends else 0):
            if high == math.inf and (most := max([low, *curve])) < self.largest:
                eps = min(self.largest, 2 * most)
                high = eps if succeeds(eps) else high
        for _ in range(_NEIGHBOURS if math.isfinite(high) else 0):
            if high - low > self._width(high):
                middle = (low + high) / 2
                low, high = (low, middle) if succeeds(middle) else (middle, high)
        return curve

    def _smallest_success(self) -> float:
        reached = (eps for eps, found in self.tried.items() if self.errors(found).error >= self.delta)
        return min(reached, default=math.inf)

    def _reach(self) -> float:
        return max(self.tried, default=0.0)

    def _width(self, high: float) -> float:
        return max(self.tolerance * high, FLOOR * self.largest)

    def _halvings(self, low: float, high: float) -> int:
        """Approximate number of halvings the bracket needs; an eps far below it needs more."""
        if not math.isfinite(high) or high == 0:
            return 0
        return max(0, math.ceil(math.log2(max(1.0, (high - low) / self._width(max(low, high / 2))))))
