"""Perlin noise with a hash of its own, so that a pattern is the same on every machine."""

from __future__ import annotations

import math

import torch

LATTICE = 256
"""The hash repeats after this many lattice cells, and the one-octave noise with it."""
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
    """Mix integers into 32 bits, by integer arithmetic alone (multiply, shift, exclusive or).

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
        slope = _DIRECTIONS[hashed(seed, at_x, at_y) >> 29]
        return slope[..., 0] * (u - right) + slope[..., 1] * (v - down)

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

    Octaves of gradient noise are summed and stretched to [0, 1]; ``frequency`` then bends them into bands,
    sin(n * frequency * pi), stretched again.

    Args:
        size: (H, W) in pixels.
        period: pixels a lattice cell of the first octave.
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
