"""The Square attack, and random search as the control of query attacks."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, model_validator

from gambeson.attacks.query.base import InfOr2, QueryAttack, Search
from gambeson.attacks.registry import register
from gambeson.base import Number, generator
from gambeson.tasks import Task
from gambeson.threat import Ball, Eps, perturb


@register("random-search", source="the control of the query attacks", cost="at most queries / 0")
class RandomSearch(QueryAttack):
    """The control of query attacks: independent draws on the surface of the ball, of which the best is kept.

    Random signs scaled to norm eps. An attack that learns from its queries should beat it at the same budget.
    Cost: at most ``queries`` forwards per image.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: InfOr2 = "inf"
    """Norm of the ball."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def _null(self) -> bool:
        return self.eps == 0

    def _search(self, search: Search, seed: int) -> None:
        x = search.images
        draw = generator(seed, "random-search", device=x.device)
        for _ in range(search.left):
            if len(search.active) == 0:
                break
            # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
            delta = self.ball.signs(x.shape, draw).to(x.dtype)
            search.offer(perturb(x[search.active], delta[search.active]))


_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations, of 10,000, after which the share of pixels is halved (authors' code)."""


@register("square", source="Andriushchenko et al. 2020", cost="at most queries / 0")
class Square(RandomSearch):
    """Square attack (Andriushchenko et al. 2020, section 3): random windows of norm eps, kept if they help.

    Windows of all images are placed at once, without a Python loop over images. The loss is the margin of the scores if
    untargeted and their negative cross-entropy if targeted, as in the authors' code; ``loss`` overrides this. The
    share of pixels is halved at the authors' iterations, scaled to the budget. Windows are limited to the shorter side
    of the image. The steps for ``norm="2"`` are Algorithm 3. Cost: at most ``queries`` forwards per image; an eighth of
    them for abandoned images.
    """

    p_init: Annotated[Number, Field(gt=0, le=1)] = 0.8
    """Initial share of pixels in a window: 0.8 in the authors' commands for MNIST and CIFAR-10; for ImageNet they use
    0.05 (inf) and 0.1 (2)."""
    rescale: bool = True
    """Stretch the schedule, made for 10,000 iterations, to the budget (the paper); False: as in AutoAttack."""
    early_abandon: Annotated[Number, Field(gt=0)] | None = None
    """Leave an image alone once the margin is so far from a wrong answer that it would not get there within the
    budget though every doubling of the queries brought ``early_abandon`` times what the last one brought (ours: what
    random search still finds shrinks with each doubling, so that 1 is already patient). Judged after an eighth, a
    quarter and half of the budget. For models that return logits: the margin of saturated probabilities tells
    nothing. For one label per image. None: spend the whole budget, as in the paper."""

    @model_validator(mode="after")
    def _check_early_abandon(self) -> Square:
        if self.early_abandon is not None and (self.loss or self._default_loss) != "margin":
            raise ValueError("early_abandon reads the margin's distance to a wrong answer: set loss='margin'")
        return self

    def _check_task(self, task: Task) -> None:
        if self.early_abandon is not None:
            task.require_classification("early_abandon", "leave it out")

    def side(self, iteration: int, shape: tuple[int, ...]) -> int:
        """Return the side of the window at an iteration, in pixels of an image (C, H, W)."""
        position = iteration / self.queries * 10_000 if self.rescale else iteration
        share = self.p_init / 2 ** sum(int(position) > halving for halving in _HALVINGS)
        side = max(round((share * shape[1] * shape[2]) ** 0.5), 1)
        if self.norm == "2":
            side = max(side, 3) | 1  # the paper's bump has a middle pixel
        shorter = min(shape[1:])
        if side <= shorter:
            return side
        return shorter - (self.norm == "2" and shorter % 2 == 0 and shorter > 1)

    def _search(self, search: Search, seed: int) -> None:
        draw = generator(seed, "square", device=search.images.device)
        start, step = (_stripes, _place) if self.norm == "inf" else (_bumps, _move)
        if search.left:
            delta = start(search.images, self.ball, draw)
            search.offer(perturb(search.images, delta)[search.active])
        earlier = None
        for iteration in range(search.left):
            asked = self.queries - search.left
            if self.early_abandon and asked in [self.queries >> halvings for halvings in (4, 3, 2, 1)]:
                if earlier is not None:
                    reach = self.early_abandon * math.log2(self.queries / asked)
                    search.leave(search.value + reach * (search.value - earlier) < 0)
                earlier = search.value.clone()
            if len(search.active) == 0:
                break
            side = self.side(iteration, search.images.shape[1:])
            # Drawn for the whole batch, as above; only active images are computed and queried.
            corners = [
                torch.rand(2, len(search.images), generator=draw, device=draw.device)
                .mul(size - side + 1)
                .long()
                .clamp(max=size - side)[:, search.active]
                for size in search.images.shape[2:]
            ]
            signs, chance = _signs_and_chance(search.images, draw)
            images, best = search.images[search.active], search.best[search.active]
            delta = step(images, best - images, self.ball, corners, side, signs[search.active], chance[search.active])
            search.offer(perturb(images, delta))


def _signs_and_chance(images: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random sign per channel (N, C, 1, 1), and a number in [0, 1) per image (N,)."""
    shape = (*images.shape[:2], 1, 1)
    signs = torch.randint(0, 2, shape, generator=draw, device=draw.device).to(images.dtype) * 2 - 1
    return signs, torch.rand(len(images), generator=draw, device=draw.device)


def _stripes(images: torch.Tensor, ball: Ball, draw: torch.Generator) -> torch.Tensor:
    """Columns of +-eps, a sign per channel and column (paper, section 3.3)."""
    n, c, _, w = images.shape
    return ball.signs((n, c, 1, w), draw).to(images.dtype).expand_as(images)


def _place(
    images: torch.Tensor,
    delta: torch.Tensor,
    ball: Ball,
    corners: list[torch.Tensor],
    side: int,
    signs: torch.Tensor,
    chance: torch.Tensor,
) -> torch.Tensor:
    """Set a window to +-eps, a sign per channel (paper, Algorithm 2), never to what it is already (authors' code)."""
    (c, h, w), (top, left) = images.shape[1:], (corner[0] for corner in corners)
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    inside = ((rows >= top[:, None]) & (rows < top[:, None] + side))[:, None, :, None] & (
        (columns >= left[:, None]) & (columns < left[:, None] + side)
    )[:, None, None, :]
    strength = ball.fill(signs)
    wanted = torch.where(inside, perturb(images, strength.expand_as(images)) - images, delta)
    idle = ((wanted - delta).abs() < 1e-7).flatten(1).all(1)
    # A different draw at once: flip a random non-empty set of channels.
    pick = 1 + (chance * (2**c - 1)).long().clamp(max=2**c - 2)
    turn = (pick[:, None] >> torch.arange(c, device=pick.device)) & 1
    turned = torch.where((turn == 1)[:, :, None, None], -strength, strength)
    # Projected, so that rounding does not accumulate over thousands of windows.
    return ball.project(torch.where(inside, torch.where(idle.view(-1, 1, 1, 1), turned, strength), delta))


def _bumps(images: torch.Tensor, ball: Ball, draw: torch.Generator) -> torch.Tensor:
    """Return a grid of five by five bumps of random sign, scaled to norm eps (paper, section 3.4)."""
    n, c, h, w = images.shape
    side = max(min(h, w) // 5, 1)
    down, across = h // side, w // side
    bump = _bump(side, images)
    signs = torch.randint(0, 2, (n, c, down, across, 1, 1), generator=draw, device=draw.device) * 2 - 1
    turn = torch.rand(n, 1, down, across, 1, 1, generator=draw, device=draw.device) < 0.5
    tiles = torch.where(turn, bump.T, bump) * signs
    delta = torch.zeros_like(images)
    top, left = (h - down * side) // 2, (w - across * side) // 2
    grid = tiles.transpose(3, 4).reshape(n, c, down * side, across * side)
    delta[:, :, top : top + down * side, left : left + across * side] = grid
    return ball.fill(delta)


def _move(
    images: torch.Tensor,
    delta: torch.Tensor,
    ball: Ball,
    corners: list[torch.Tensor],
    side: int,
    signs: torch.Tensor,
    chance: torch.Tensor,
) -> torch.Tensor:
    """Move the energy of a second window, and what eps has left, into a bump in the first (paper, Algorithm 3)."""
    n, c = images.shape[:2]
    offsets = torch.arange(side, device=images.device)
    batch, channel = (torch.arange(size, device=images.device) for size in (n, c))
    windows = [
        (batch[:, None, None, None], channel[:, None, None], (top[:, None] + offsets)[:, None, :, None],
         (left[:, None] + offsets)[:, None, None, :])
        for top, left in zip(*corners, strict=True)
    ]  # fmt: skip
    first, second = windows
    unused = (ball.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    either = torch.zeros_like(delta, dtype=torch.bool)
    either[first] = True
    either[second] = True
    energy = (delta.square() * either).sum((2, 3), keepdim=True) + unused / c
    bump = _bump(side, images)
    bump = torch.where((chance < 0.5).view(-1, 1, 1, 1), bump.T, bump) * signs
    held = delta[first]
    bump = bump + held / held.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-10)
    moved = delta.clone()
    moved[second] = 0
    moved[first] = bump / bump.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-10) * energy.sqrt()
    return ball.fill(moved)


def _bump(side: int, like: torch.Tensor) -> torch.Tensor:
    """Return two opposite pyramids side by side, of Euclidean norm 1 (paper, section 3.4: eta), (side, side)."""
    if side == 1:
        return like.new_ones(1, 1)
    half = side // 2
    bump = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)])
    return (bump / bump.norm()).to(like)


def _pyramid(height: int, width: int) -> torch.Tensor:
    # The k-th ring around the middle has the sum of 1 / j^2 for j from its distance on.
    middle = height // 2, width // 2
    away = torch.maximum(
        (torch.arange(height) - middle[0]).abs()[:, None], (torch.arange(width) - middle[1]).abs()[None, :]
    )
    rings = max(middle) + 1
    share = torch.tensor([1 / (ring + 1) ** 2 for ring in range(rings)], dtype=torch.float64)
    levels = share.flip(0).cumsum(0).flip(0)
    pyramid = levels[away]
    return pyramid / pyramid.norm()
