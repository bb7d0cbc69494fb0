"""Procedural universal perturbations: noise patterns found by queries alone, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gambeson.attacks.bayesian import first_points, latin_hypercube, propose
from gambeson.attacks.crafting import UniversalAttack
from gambeson.attacks.gabor import gabor, kernel_width
from gambeson.attacks.perlin import perlin
from gambeson.attacks.registry import register
from gambeson.attacks.workshop import Candidate, Workshop
from gambeson.base import Number, derive, generator

Bounds = list[tuple[float, float]]


class ProceduralAttack(UniversalAttack):
    """Base of the procedural attacks: patterns of few parameters, searched by their error on training images.

    The model is only asked for its scores. Exactly ``patterns`` patterns are tried, each on the same ``images``
    training images: ``patterns * images`` forwards and no backward, then ``finalists`` forwards of validation, which
    chooses among the best. The paper's searches are Bayesian, with a Gaussian process of Matern 5/2 kernel and
    expected improvement, or 1,000 random patterns; the evolution and all sizes here are ours.
    """

    patterns: Annotated[int, Field(ge=1)] = 100
    """Patterns tried."""
    images: Annotated[int, Field(ge=1)] = 500
    """Training images that each pattern is tried on."""
    search: Literal["random", "evolution", "bayesian"] = "evolution"
    """``random``: independent draws. ``evolution``: a third are random, the others vary the best ones so far.
    ``bayesian``: a few are spread over the box, the others are where a Gaussian process expects the most
    (:func:`gambeson.attacks.bayesian.propose`)."""
    parents: Annotated[int, Field(ge=1)] = 5
    """Patterns that the evolution varies, the best so far."""
    spread: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """Deviation of a variation as a share of the box; it halves over the search."""
    finalists: Annotated[int, Field(ge=1)] = 5
    """Best patterns on the training images, among which validation chooses."""
    target: Annotated[int, Field(ge=0)] | None = None
    """Class that every image should be taken for; None: any wrong class."""

    def bounds(self, size: tuple[int, int]) -> Bounds:
        """Return the box of the parameters for images of ``size`` (H, W)."""
        raise NotImplementedError

    def pattern(self, size: tuple[int, int], values: list[float], seed: int) -> torch.Tensor:
        """Return the pattern (H, W) in [0, 1] for parameters inside the box."""
        raise NotImplementedError

    def delta(self, shape: tuple[int, ...], values: list[float], seed: int) -> torch.Tensor:
        """Return a pattern as a perturbation (1, C, H, W): +-eps where it is above or below a half, all channels alike.

        Args:
            shape: (C, H, W).
            values: parameters inside the box of :meth:`bounds`.
            seed: of the pattern's hash.
        """
        pattern = self.pattern((shape[1], shape[2]), values, seed)
        return self.ball.fill((pattern >= 0.5).float().mul(2).sub(1).expand(1, *shape))

    def _search(self, work: Workshop, start: torch.Tensor | None) -> Iterable[Candidate]:
        few, shape = work.few(self.images), tuple(work.train.shape)
        box = torch.tensor(self.bounds((shape[1], shape[2])), dtype=torch.float64)
        draw = generator(work.seed, self.name)
        tried: list[tuple[float, torch.Tensor, int]] = []
        for k in range(self.patterns):
            place, seed = self._next(tried, len(box), draw, work.seed, k)
            values = (box[:, 0] + place * (box[:, 1] - box[:, 0])).tolist()
            tried.append((work.rate(self.delta(shape, values, seed).to(work.device), few), place, seed))
        best = sorted(tried, key=lambda entry: -entry[0])[: self.finalists]
        for _, place, seed in best:
            values = (box[:, 0] + place * (box[:, 1] - box[:, 0])).tolist()
            label = " ".join(f"{value:.3g}" for value in values)
            yield Candidate(start=f"{label} seed {seed}", delta=self.delta(shape, values, seed).to(work.device))
        if start is not None:
            yield Candidate(start="given", delta=start)

    def _next(
        self,
        tried: list[tuple[float, torch.Tensor, int]],
        size: int,
        draw: torch.Generator,
        seed: int,
        k: int,
    ) -> tuple[torch.Tensor, int]:
        """Return the next point of the unit cube to try, and the seed of its pattern's hash."""
        fresh = derive(seed, self.name, "hash", k) % 2**32
        if self.search == "bayesian":
            return self._expected(tried, size, draw, seed, k), fresh
        place = torch.rand(size, generator=draw, dtype=torch.float64)
        if self.search == "random" or k < max(1, self.patterns // 3):
            return place, fresh
        ranked = sorted(tried, key=lambda entry: -entry[0])[: self.parents]
        one, same = torch.rand(2, generator=draw).tolist()
        _, parent, parent_seed = ranked[int(one * len(ranked))]
        width = self.spread * 0.5 ** (k / self.patterns)
        moved = parent + width * torch.randn(size, generator=draw, dtype=torch.float64)
        moved = (moved + 1).remainder(2) - 1  # reflected at the walls of the cube
        return moved.abs().clamp(0, 1), parent_seed if same < 0.5 else fresh

    def _expected(
        self, tried: list[tuple[float, torch.Tensor, int]], size: int, draw: torch.Generator, seed: int, k: int
    ) -> torch.Tensor:
        first = first_points(self.patterns, size)
        if k < first:
            return latin_hypercube(first, size, generator(seed, self.name, "first"))[k]
        rates = torch.tensor([rate for rate, _, _ in tried], dtype=torch.float64)
        return propose(torch.stack([place for _, place, _ in tried]), rates, draw)


@register("perlin", source="Co et al. 2019", cost="patterns x images / 0")
class PerlinNoise(ProceduralAttack):
    """Perlin noise (Co et al., CCS 2019, arXiv 1810.00470): period, octaves and the sine's frequency are searched.

    The paper's box at 299 pixels is a period of 20 to 160 pixels, a frequency of 4 to 32 and 1 to 4 octaves; the
    period is scaled with the image here, with 2 pixels at the least, which is ours.
    """

    name: ClassVar[str] = "perlin-noise"

    def bounds(self, size: tuple[int, int]) -> Bounds:
        """Period in pixels, octaves (rounded down), and frequency of the sine."""
        side = min(size)
        return [(max(2.0, side * 20 / 299), max(2.0, side * 160 / 299)), (1.0, 5.0), (4.0, 32.0)]

    def pattern(self, size: tuple[int, int], values: list[float], seed: int) -> torch.Tensor:
        """Return the pattern (H, W) in [0, 1]."""
        period, octaves, frequency = values
        return perlin(size, period=period, octaves=min(4, int(octaves)), frequency=frequency, seed=seed)


@register("gabor", source="Co et al. 2019", cost="patterns x images / 0")
class GaborNoise(ProceduralAttack):
    """Gabor noise (Co et al., arXiv 1810.00470): sigma, orientation, wavelength and number of sides are searched.

    The box is ours: it holds the values of the public code (kernel 23 pixels wide, sigma 8, wavelength 8).
    """

    name: ClassVar[str] = "gabor-noise"

    def bounds(self, size: tuple[int, int]) -> Bounds:
        """Sigma in pixels, orientation in radians, wavelength in pixels, and sides (rounded down)."""
        width = kernel_width(size)
        return [(0.1 * width, 0.5 * width), (0.0, math.pi), (2.0, float(width)), (1.0, 9.0)]

    def pattern(self, size: tuple[int, int], values: list[float], seed: int) -> torch.Tensor:
        """Return the pattern (H, W) in [0, 1]."""
        sigma, orientation, wavelength, sides = values
        return gabor(
            size, sigma=sigma, orientation=orientation, wavelength=wavelength, sides=min(8, int(sides)), seed=seed
        )
