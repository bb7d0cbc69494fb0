"""The random resized crop, for a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Share of the image's area; width over height; draws before the largest box in the middle stands in: torchvision's."""

Boxes = torch.Tensor
"""(N, 4): top, left, height and width of each image's box, in pixels, float32 with whole values."""


def zoom(
    x: torch.Tensor, generator: torch.Generator, maps: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Enlarge a random box of every image to the image's size, and mirror it with probability 1/2.

    Args:
        x: images (N, C, H, W).
        generator: on the device of ``x``.
        maps: label maps (N, H, W) that move with the images, without mixing labels.

    Returns:
        The images; with ``maps``, the pair (images, maps).
    """
    boxes = draw_boxes(len(x), x.shape[2], x.shape[3], generator)
    flips = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    grid = sampling_grid(boxes, flips, x.shape[2], x.shape[3])
    images = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if maps is None:
        return images
    floats = maps[:, None].to(torch.float64)  # exact for any label
    moved = F.grid_sample(floats, grid.double(), mode="nearest", padding_mode="border", align_corners=True)
    return images, moved[:, 0].to(maps.dtype)


def draw_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Boxes:
    """Draw a box an image: area uniform, logarithm of the aspect uniform, place uniform among those that fit."""
    device = generator.device
    areas, aspects = torch.rand(2, count, TRIES, generator=generator, device=device)
    areas = height * width * (AREA[0] + areas * (AREA[1] - AREA[0]))
    low, high = map(math.log, ASPECT)
    aspects = (low + aspects * (high - low)).exp()
    wide, high_ = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (high_ > 0) & (high_ <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first of the tries that fits
    wide, high_ = wide.gather(1, first)[:, 0], high_.gather(1, first)[:, 0]
    # Where none does: the largest box of an aspect allowed, in the middle.
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    none = ~fits.any(1)
    wide = wide.where(~none, torch.tensor(float(min(width, round(height * aspect))), device=device))
    high_ = high_.where(~none, torch.tensor(float(min(height, round(width / aspect))), device=device))
    places = torch.rand(2, count, generator=generator, device=device)
    places = places.where(~none, torch.tensor(0.5, device=device))
    top = (places[0] * (height - high_ + 1)).floor().clamp_max(height - high_)
    left = (places[1] * (width - wide + 1)).floor().clamp_max(width - wide)
    return torch.stack([top, left, high_, wide], 1)


def sampling_grid(boxes: Boxes, flips: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return where each output pixel is read, (N, H, W, 2) for ``grid_sample`` with aligned corners.

    Pixel centres are spread evenly over the box and held inside it, so that the result is that of cutting the box out
    and resizing it bilinearly: enlarging needs no smoothing against aliases.
    """
    rows = _axis(boxes[:, 0], boxes[:, 2], height)
    columns = _axis(boxes[:, 1], boxes[:, 3], width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=3)


def _axis(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Return the places (N, size) of the output along one axis, from -1, the first pixel's centre, to 1, the last's."""
    centres = (torch.arange(size, device=start.device) + 0.5)[None] * length[:, None] / size - 0.5
    pixels = start[:, None] + centres.clamp_min(0).minimum(length[:, None] - 1)
    return pixels * (2 / max(1, size - 1)) - 1
