"""Results that several evaluations share, as data."""

from __future__ import annotations

from typing import Literal

from gambeson.base import Config
from gambeson.evaluation.rates import Rate


class Cost(Config):
    """Work that a number took, counted in images."""

    forwards: int = 0
    """Images sent forward through the model."""
    backwards: int = 0
    """Images whose gradient was taken."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(forwards=self.forwards + other.forwards, backwards=self.backwards + other.backwards)


class Control(Config):
    """What noise of the same size does: the floor that a crafted perturbation has to beat."""

    name: str
    """``random-sign`` or ``chessboard``."""
    mean: float
    """Mean UER over the draws."""
    worst: Rate
    """UER of the worst draw."""
    draws: int


class EpsUni(Config):
    """eps_uni(delta): the smallest eps at which a universal perturbation was found with a UER of at least delta.

    An attack only ever gives an upper bound of the true value.
    """

    delta: float
    value: float
    """The smallest success, in pixel units; the largest eps tried where ``censored``."""
    censored: bool
    """No success up to ``value``: the truth is larger than it."""
    tolerance: float
    """Width of the last bracket."""
    tried: list[tuple[float, float]]
    """Every (eps, UER) of the search, in order of eps."""
    split: Literal["validation", "test"]
    """The split that judged success."""
    cost: Cost
