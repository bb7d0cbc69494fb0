"""Gabor noise: random impulses convolved with oriented waves, from the hash of the Perlin noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gambeson.attacks.perlin import stretched, unit


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

    In every cell of the grid ``impulses`` points get a weight in [-1, 1); points that meet add up. They are convolved
    with a Gabor kernel, or with the sum of ``sides`` kernels turned evenly over half a circle.

    Args:
        size: (H, W) in pixels.
        sigma: deviation of the kernel's Gaussian in pixels.
        orientation: of its wave in radians.
        wavelength: of its wave in pixels.
        sides: number of orientations; a large one gives isotropic noise.
        width: of the kernel, odd; a thirteenth of the image but 9 at least where it is not given (the paper's 23 at
            299 pixels).
        grid: pixels a cell.
        impulses: points a cell.
        seed: of the hash, from 0 to 2**32 - 1.
    """
    width = kernel_width(size) if width is None else width
    # A margin of cells around the image, so that its edges are as dense as its middle.
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
    """Return the customary kernel width for an image of ``size``: odd, 9 at least."""
    return max(9, min(size) // 13 // 2 * 2 + 1)
