"""Times taken side by side: every candidate once a round, in turn, and the median of its ratios to a baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gambeson.base import Config, task


class Timing(Config):
    """One candidate's time over the rounds."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over the rounds of its time divided by the baseline's in the same round."""
    ratio_low: float
    ratio_high: float
    """Smallest and largest ratio of a round."""


def side_by_side(
    candidates: Mapping[str, Callable[[], object]], baseline: str, rounds: int, title: str
) -> list[Timing]:
    """Run every candidate once a round, after one round that warms up, and compare it with the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    with task(title, rounds + 1) as advance:
        for lap in range(rounds + 1):
            for name, run in candidates.items():
                began = time.perf_counter()
                run()
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                if lap:
                    taken[name].append(time.perf_counter() - began)
            advance()
    return [_timing(name, seconds, taken[baseline]) for name, seconds in taken.items()]


def _timing(name: str, seconds: list[float], baseline: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return Timing(
        name=name,
        seconds=statistics.median(seconds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )
