"""Batched augmentation: random shifts, random resized crops and flips of whole batches on their device."""

from __future__ import annotations

import math
from typing import overload

import torch
import torch.nn.functional as F

from gambeson.base.errors import UserError, unknown_name

AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Share of the image's area; width over height; tries before falling back to the largest centred box
(torchvision's)."""

Boxes = torch.Tensor
"""(N, 4): top, left, height and width of each image's box, in pixels, float32 with whole values."""


def zoom(
    x: torch.Tensor, generator: torch.Generator, maps: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Resize a random box of every image to the image's size, and flip it horizontally with probability 1/2.

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
    """Draw a box per image, uniform in area, in the logarithm of the aspect ratio, and in position."""
    device = generator.device
    areas, aspects = torch.rand(2, count, TRIES, generator=generator, device=device)
    areas = height * width * (AREA[0] + areas * (AREA[1] - AREA[0]))
    low, high = map(math.log, ASPECT)
    aspects = (low + aspects * (high - low)).exp()
    wide, high_ = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (high_ > 0) & (high_ <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits
    wide, high_ = wide.gather(1, first)[:, 0], high_.gather(1, first)[:, 0]
    # Otherwise the largest centred box with an allowed aspect ratio.
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
    """Return the sampling position of each output pixel, (N, H, W, 2) for ``grid_sample`` with aligned corners.

    Pixel centres are evenly spaced over the box and clamped to it, which equals cropping the box and resizing it
    bilinearly; enlarging needs no antialiasing.
    """
    rows = _axis(boxes[:, 0], boxes[:, 2], height)
    columns = _axis(boxes[:, 1], boxes[:, 3], width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=3)


def _axis(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Return the positions (N, size) along one axis, from -1 (centre of the first pixel) to 1 (centre of the last)."""
    centres = (torch.arange(size, device=start.device) + 0.5)[None] * length[:, None] / size - 0.5
    pixels = start[:, None] + centres.clamp_min(0).minimum(length[:, None] - 1)
    return pixels * (2 / max(1, size - 1)) - 1


KINDS = ("none", "crop", "crop-flip", "imagenet")
PAD = 4
"""Zero padding around the image; a crop shifts it by up to this many pixels each way, as is usual for CIFAR."""
IGNORED = -100
"""Padding of label maps without an ignore index: the label that torch's losses ignore by default."""


@overload
def augment(
    x: torch.Tensor, kind: str, generator: torch.Generator, maps: None = None, ignore_index: int | None = None
) -> torch.Tensor: ...
@overload
def augment(
    x: torch.Tensor, kind: str, generator: torch.Generator, maps: torch.Tensor, ignore_index: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]: ...
def augment(
    x: torch.Tensor,
    kind: str,
    generator: torch.Generator,
    maps: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Shift or zoom, and flip, every image of a batch by its own random amount.

    Args:
        x: images (N, C, H, W).
        kind: "none"; "crop", a shift of up to 4 pixels each way with zeros coming in; "crop-flip", which also
            mirrors each image left to right with probability 1/2; or "imagenet", which takes a random box of 8 to 100 %
            of the area and of an aspect from 3/4 to 4/3, enlarges it to the image's size, and mirrors as well: the
            augmentation of Szegedy et al. 2015 ("Going deeper with convolutions", section 6) as torchvision's
            RandomResizedCrop has it, except that the box is cut from the image as it comes, not from the whole
            photograph before that is made square. The deviation lets images be decoded in one way for every purpose,
            and augmented in batches.
        generator: the only source of randomness, on the device of ``x``.
        maps: label maps (N, H, W) that move with the images.
        ignore_index: padding of the maps; -100 if None.

    Returns:
        The images, new unless ``kind`` is "none"; with ``maps``, the pair (images, maps).

    Raises:
        UserError: an unknown kind, a generator on another device, or maps of another size than the images.
    """
    if kind not in KINDS:
        raise unknown_name("augmentation", kind, KINDS)
    if generator.device.type != x.device.type:
        raise UserError(f"the generator is on {generator.device} and the images on {x.device}: make it on that device")
    if maps is not None and maps.shape != (len(x), *x.shape[2:]):
        raise UserError(f"maps have shape {tuple(maps.shape)}: expected {(len(x), *x.shape[2:])}, one map per image")
    if kind == "none":
        return x if maps is None else (x, maps)
    if kind == "imagenet":
        return zoom(x, generator, maps)
    shifts = torch.randint(2 * PAD + 1, (2, len(x)), generator=generator, device=x.device)
    flips = None
    if kind == "crop-flip":
        flips = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    moved = _move(x, shifts, flips, 0)
    if maps is None:
        return moved
    return moved, _move(maps[:, None], shifts, flips, IGNORED if ignore_index is None else ignore_index)[:, 0]


def _move(x: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor | None, fill: int) -> torch.Tensor:
    count, channels, height, width = x.shape
    padded = F.pad(x, (PAD,) * 4, value=fill)
    columns = torch.arange(width, device=x.device).expand(count, width)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    rows = shifts[0][:, None] + torch.arange(height, device=x.device)
    # Where each pixel comes from, so that one kernel crops and flips: (N, 1, H * W).
    places = (rows * padded.shape[3])[:, :, None] + (shifts[1][:, None] + columns)[:, None, :]
    return padded.flatten(2).gather(2, places.view(count, 1, -1).expand(-1, channels, -1)).view(x.shape)
