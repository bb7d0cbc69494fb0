"""RayS: an attack by decisions alone, which seeks the direction in which the answer changes soonest."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from gambeson.attacks.query.base import QueryAttack, Search
from gambeson.attacks.registry import register
from gambeson.base import Number
from gambeson.tasks import Task
from gambeson.threat import Ball, Eps, perturb
from gambeson.threat.ball import NORM_RULES


@register("rays", source="Chen and Gu 2020", cost="at most queries / 0")
class RayS(QueryAttack):
    """Ray searching attack (Chen and Gu 2020, Algorithms 1 to 3): untargeted, in the norm inf, by the top class alone.

    An image's direction is a vector of signs, all +1 at first. Its blocks are flipped in turn: the whole of it, then
    halves, quarters and so on down to single values. A flip is kept if the image is misclassified within the smallest
    radius so far, which a bisection then makes smaller. Pixels are clipped to [0, 1] all along. Ours: a bisection looks
    at eps first, and goes on between it and the smallest radius, since a radius inside the ball ends the search of an
    image; after single values it begins again with the whole. Cost: at most ``queries`` forwards per image.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Annotated[Literal["inf"], *NORM_RULES] = "inf"
    """Norm of the ball; directions are signs."""
    tolerance: Annotated[Number, Field(gt=0)] = 0.001
    """Width of the last bracket of a bisection, in pixel units (authors' code)."""

    @model_validator(mode="after")
    def _decisions_only(self) -> RayS:
        if self.targeted or self.loss is not None:
            raise ValueError("rays reads the top class alone, to leave it: omit targeted and loss, or choose square")
        return self

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps)

    @property
    def _null(self) -> bool:
        return self.eps == 0

    def _check_task(self, task: Task) -> None:
        task.require_classification("rays", "choose square")

    def _search(self, search: Search, seed: int) -> None:
        rays = _Rays(search.images, self.ball)
        while search.left and len(search.active):
            active = search.active
            radius, candidates = rays.candidates(active)
            value, wrong = search.ask(candidates, active)
            inside = radius <= self.eps
            rays.learn(active, radius, wrong, self.tolerance)
            search.keep(candidates, value.masked_fill(~inside, -torch.inf), wrong & inside)


class _Rays:
    """The directions of all images, each at its own place in the search.

    Attributes:
        signs: (N, D), the best direction of each image, and ``trial`` the one that is tried.
        reach: (N,) the radius at which the best one is misclassified; infinite if it is not known to be.
        low, high: (N,) the bracket of a bisection; ``high`` is zero while there is none, ``low`` until eps was asked.
    """

    def __init__(self, images: torch.Tensor, ball: Ball) -> None:
        self.images, self.ball = images, ball
        self.signs = torch.ones_like(images).flatten(1)
        self.trial = self.signs.clone()
        self.reach = images.new_full((len(images),), torch.inf)
        self.low, self.high = images.new_zeros(len(images)), images.new_zeros(len(images))
        self.stage = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.block = torch.full_like(self.stage, -1)  # the first trial flips nothing

    def candidates(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the radii to ask about (A,), and the images there."""
        low, high = self.low[rows], self.high[rows]
        halved = torch.where(low > 0, (low + high) / 2, self.ball.eps)  # at eps first
        radius = torch.where(high > 0, halved, self.reach[rows].clamp(max=1))
        delta = (radius[:, None] * self.trial[rows]).view_as(self.images[rows])
        inside = (radius <= self.ball.eps).view(-1, 1, 1, 1)
        return radius, perturb(self.images[rows], torch.where(inside, self.ball.project(delta), delta))

    def learn(self, rows: torch.Tensor, radius: torch.Tensor, wrong: torch.Tensor, tolerance: float) -> None:
        """Take the decisions (A,) about those candidates, and go on to the next one of each image."""
        bisecting = self.high[rows] > 0
        begun, failed = wrong & ~bisecting, ~wrong & ~bisecting
        self.high[rows[wrong]] = radius[wrong]
        self.low[rows[bisecting & ~wrong]] = radius[bisecting & ~wrong]
        ended = bisecting & (self.high[rows] - self.low[rows] <= tolerance)
        better = rows[ended]
        self.reach[better], self.signs[better] = self.high[better], self.trial[better]
        self.low[rows[begun | ended]] = 0
        self.high[better] = 0
        self._flip(rows[failed | ended])

    def _flip(self, rows: torch.Tensor) -> None:
        """Try the next block of these images."""
        if not len(rows):
            return
        size, places = self.signs.shape[1], torch.arange(self.signs.shape[1], device=rows.device)
        self.block[rows] += 1
        width = _width(size, self.stage[rows])
        over = self.block[rows] * width >= size
        self.stage[rows[over]] = torch.where(width[over] == 1, 0, self.stage[rows[over]] + 1)
        self.block[rows[over]] = 0
        width = _width(size, self.stage[rows])
        first = (self.block[rows] * width)[:, None]
        flipped = (places >= first) & (places < first + width[:, None])
        self.trial[rows] = torch.where(flipped, -self.signs[rows], self.signs[rows])


def _width(size: int, stage: torch.Tensor) -> torch.Tensor:
    """Return the number of values per block at a stage, of so many values."""
    return (size + (1 << stage) - 1) // (1 << stage)
