"""Procedural attacks: Perlin and Gabor noise, identical on every machine, with a search of their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from gambeson.attacks.registry import register
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.bayesian import first_points, latin_hypercube, propose
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.target import TargetSetting
from gambeson.base import Number, derive, generator
from gambeson.data import Dataset

LATTICE = 256
"""Period of the hash, and of one-octave noise, in lattice cells."""
_MASK = 2**32 - 1
_DIAGONAL = math.sqrt(0.5)
_DIRECTIONS = torch.tensor(
    [
        (1.0, 0.0),
        (_DIAGONAL, _DIAGONAL),
        (0.0, 1.0),
        (-_DIAGONAL, _DIAGONAL),
        (-1.0, 0.0),
        (-_DIAGONAL, -_DIAGONAL),
        (0.0, -1.0),
        (_DIAGONAL, -_DIAGONAL),
    ],
    dtype=torch.float64,
)


def hashed(*keys: torch.Tensor | int) -> torch.Tensor:
    """Hash integers to 32 bits with integer arithmetic only (multiply, shift, exclusive or).

    Args:
        keys: non-negative integer tensors below 2**32 that broadcast against each other, or plain integers.

    Returns:
        int64 in [0, 2**32).
    """
    state = torch.as_tensor(0x9E3779B9, dtype=torch.int64)
    for key in keys:
        state = state ^ (torch.as_tensor(key, dtype=torch.int64) & _MASK)
        for shift, factor in ((16, 0x45D9F3B), (15, 0x119DE1F3), (16, 1)):
            state = ((state ^ (state >> shift)) * factor) & _MASK
    return state


def unit(*keys: torch.Tensor | int) -> torch.Tensor:
    """Return hashed numbers in [0, 1), float64."""
    return hashed(*keys).double() / 2**32


def gradient_noise(x: torch.Tensor, y: torch.Tensor, seed: torch.Tensor | int) -> torch.Tensor:
    """Return 2-D gradient noise (Perlin 2002): zero at lattice points, periodic with :data:`LATTICE`.

    Args:
        x: coordinates in lattice cells, float64; broadcasts against ``y``.
        y: the other coordinate.
        seed: of the hash; broadcasts too.
    """
    cell_x, cell_y = x.floor(), y.floor()
    u, v = x - cell_x, y - cell_y

    def corner(right: int, down: int) -> torch.Tensor:
        at_x, at_y = (cell_x.long() + right) % LATTICE, (cell_y.long() + down) % LATTICE
        gradient = _DIRECTIONS[hashed(seed, at_x, at_y) >> 29]
        return gradient[..., 0] * (u - right) + gradient[..., 1] * (v - down)

    s, t = _fade(u), _fade(v)
    upper = corner(0, 0) + s * (corner(1, 0) - corner(0, 0))
    lower = corner(0, 1) + s * (corner(1, 1) - corner(0, 1))
    return upper + t * (lower - upper)


def _fade(t: torch.Tensor) -> torch.Tensor:
    return t**3 * (10 + t * (6 * t - 15))


def perlin(
    size: tuple[int, int],
    *,
    period: float,
    octaves: int = 1,
    frequency: float = 0.0,
    seed: int = 0,
    lacunarity: float = 2.0,
    persistence: float = 0.5,
) -> torch.Tensor:
    """Return one Perlin pattern in [0, 1], float64 (H, W) (Co et al., CCS 2019, arXiv 1810.00470).

    Octaves of gradient noise are summed and rescaled to [0, 1]; ``frequency`` then turns them into bands, sin(n *
    frequency * pi), rescaled again.

    Args:
        size: (H, W) in pixels.
        period: pixels per lattice cell of the first octave.
        octaves: each next one has ``lacunarity`` times the frequency and ``persistence`` times the amplitude.
        frequency: of the sine; 0 leaves it out.
        seed: of the hash, from 0 to 2**32 - 1.
        lacunarity: growth of the frequency.
        persistence: decay of the amplitude.
    """
    rows = torch.arange(size[0], dtype=torch.float64).view(-1, 1) / period
    columns = torch.arange(size[1], dtype=torch.float64).view(1, -1) / period
    total = torch.zeros(size, dtype=torch.float64)
    for octave in range(octaves):
        scale = lacunarity**octave
        total += persistence**octave * gradient_noise(columns * scale, rows * scale, hashed(seed, octave))
    pattern = stretched(total)
    return stretched((pattern * frequency * math.pi).sin()) if frequency else pattern


def stretched(values: torch.Tensor) -> torch.Tensor:
    """Map the smallest value to 0 and the largest to 1; a constant becomes 0.5."""
    low, high = torch.aminmax(values)
    return (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)


def gabor_kernel(width: int, *, sigma: float, orientation: float, wavelength: float) -> torch.Tensor:
    """Return a Gabor kernel (width, width), float64: a Gaussian times a cosine wave, one at its centre.

    Args:
        width: odd, in pixels.
        sigma: deviation of the Gaussian in pixels.
        orientation: of the wave's direction, in radians from the columns' axis.
        wavelength: of the wave in pixels.
    """
    reach = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    rows, columns = reach.view(-1, 1), reach.view(1, -1)
    along = columns * math.cos(orientation) + rows * math.sin(orientation)
    bell = torch.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    return bell * torch.cos(2 * math.pi / wavelength * along)


def gabor(
    size: tuple[int, int],
    *,
    sigma: float,
    orientation: float,
    wavelength: float,
    sides: int = 1,
    width: int | None = None,
    grid: int = 5,
    impulses: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """Return one Gabor noise pattern in [0, 1], float64 (H, W) (Lagae et al. 2009; Co et al., arXiv 1810.00470).

    In every cell of the grid ``impulses`` points get a weight in [-1, 1); coinciding points add up. They are convolved
    with a Gabor kernel, or with the sum of ``sides`` kernels, evenly rotated over half a circle.

    Args:
        size: (H, W) in pixels.
        sigma: deviation of the kernel's Gaussian in pixels.
        orientation: of its wave in radians.
        wavelength: of its wave in pixels.
        sides: number of orientations; a large one gives isotropic noise.
        width: of the kernel, odd; by default a thirteenth of the image but at least 9 (the paper's 23 at 299 pixels).
        grid: pixels per cell.
        impulses: points per cell.
        seed: of the hash, from 0 to 2**32 - 1.
    """
    width = kernel_width(size) if width is None else width
    # A margin of cells around the image, so that the density is uniform.
    margin = width // 2
    height, breadth = size[0] + 2 * margin, size[1] + 2 * margin
    cells_down, cells_across = math.ceil(height / grid), math.ceil(breadth / grid)
    down = torch.arange(cells_down).view(-1, 1, 1)
    across = torch.arange(cells_across).view(1, -1, 1)
    point = torch.arange(impulses).view(1, 1, -1)
    rows = down * grid + (unit(seed, down, across, point, 0) * grid).long()
    columns = across * grid + (unit(seed, down, across, point, 1) * grid).long()
    weights = unit(seed, down, across, point, 2) * 2 - 1
    sheet = torch.zeros(cells_down * grid, cells_across * grid, dtype=torch.float64)
    sheet.view(-1).index_add_(0, (rows * sheet.shape[1] + columns).flatten(), weights.flatten())
    kernel = torch.stack(
        [
            gabor_kernel(width, sigma=sigma, orientation=orientation + math.pi * k / sides, wavelength=wavelength)
            for k in range(sides)
        ]
    ).sum(0)
    answer = F.conv2d(sheet[None, None, :height, :breadth], kernel.flip(0, 1)[None, None])[0, 0]
    return stretched(answer[: size[0], : size[1]])


def kernel_width(size: tuple[int, int]) -> int:
    """Return the default kernel width for an image of ``size``: odd, at least 9."""
    return max(9, min(size) // 13 // 2 * 2 + 1)


Bounds = list[tuple[float, float]]


class ProceduralAttack(UniversalAttack):
    """Base of the procedural attacks: patterns with a few parameters, searched by their error on training images.

    Only the model's scores are used. Exactly ``patterns`` patterns are evaluated on the same ``images`` training
    images: ``patterns * images`` forwards and no backward, then ``finalists`` forwards of validation, which selects
    among the best; with edits, as many through each. The paper's searches are Bayesian, with a Gaussian process of
    Matern 5/2 kernel and expected improvement, or 1,000 random patterns; the evolution and all sizes here are ours.
    """

    gradients: ClassVar[bool] = False

    patterns: Annotated[int, Field(ge=1)] = 100
    """Number of patterns evaluated."""
    images: Annotated[int, Field(ge=1)] = 500
    """Training images per pattern."""
    search: Literal["random", "evolution", "bayesian"] = "evolution"
    """``random``: independent draws. ``evolution``: a third are random, the others vary the best ones so far.
    ``bayesian``: a few are spread over the box, the others maximise the expected improvement of a Gaussian process
    (:func:`gambeson.attacks.universal.bayesian.propose`)."""
    parents: Annotated[int, Field(ge=1)] = 5
    """Best patterns so far, which the evolution varies."""
    spread: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """Standard deviation of a variation as a share of the box; it halves over the search."""
    finalists: Annotated[int, Field(ge=1)] = 5
    """Best patterns on the training images, among which validation selects."""
    target: TargetSetting = None
    """What should be predicted, such as a class for every image (:class:`gambeson.attacks.Target`); None: anything
    wrong."""

    def asked(self, data: Dataset) -> int:
        """Return about how many images a deterministic model will be asked about."""
        finalists = min(self.finalists, self.patterns)
        rates = self.patterns * min(self.images, len(data.train)) + finalists * len(data.validation)
        return rates * max(1, len(self.edits))

    def bounds(self, size: tuple[int, int]) -> Bounds:
        """Return the box of the parameters for images of ``size`` (H, W)."""
        raise NotImplementedError

    def pattern(self, size: tuple[int, int], values: list[float], seed: int) -> torch.Tensor:
        """Return the pattern (H, W) in [0, 1] for parameters inside the box."""
        raise NotImplementedError

    def delta(self, shape: tuple[int, ...], values: list[float], seed: int) -> torch.Tensor:
        """Return a pattern as a perturbation (1, C, H, W): +-eps where it is above or below 0.5, equal in all channels.

        Args:
            shape: (C, H, W).
            values: parameters inside the box of :meth:`bounds`.
            seed: of the pattern's hash.
        """
        pattern = self.pattern((shape[1], shape[2]), values, seed)
        return self.ball.fill((pattern >= 0.5).float().mul(2).sub(1).expand(1, *shape))

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        few, shape = context.few(self.images), tuple(context.train.shape)
        box = torch.tensor(self.bounds((shape[1], shape[2])), dtype=torch.float64)
        draw = generator(context.seed, self.name)
        tried: list[tuple[float, torch.Tensor, int]] = []
        for k in range(self.patterns):
            place, seed = self._next(tried, len(box), draw, context.seed, k)
            values = (box[:, 0] + place * (box[:, 1] - box[:, 0])).tolist()
            tried.append((context.rate(self.delta(shape, values, seed).to(context.device), few), place, seed))
        best = sorted(tried, key=lambda entry: -entry[0])[: self.finalists]
        for _, place, seed in best:
            values = (box[:, 0] + place * (box[:, 1] - box[:, 0])).tolist()
            label = " ".join(f"{value:.3g}" for value in values)
            yield Candidate(start=f"{label} seed {seed}", delta=self.delta(shape, values, seed).to(context.device))
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

    The paper's box at 299 pixels is a period of 20 to 160 pixels, a frequency of 4 to 32 and 1 to 4 octaves; here the
    period is scaled with the image, with at least 2 pixels (ours).
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

    The box is ours; it contains the values of the public code (kernel 23 pixels wide, sigma 8, wavelength 8).
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
