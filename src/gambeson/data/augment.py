"""Random crops, zooms and flips for a whole batch at once, on its device, each image with its own draw."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F

from gambeson.base.errors import UserError, unknown_name
from gambeson.data.zoom import zoom

KINDS = ("none", "crop", "crop-flip", "imagenet")
PAD = 4
"""Zeros around the image; a crop moves it by up to this many pixels each way, as is usual for CIFAR."""
IGNORED = -100
"""What maps are padded with where no ignore index is given: the label that torch's losses skip by default."""


@overload
def augment(x: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor: ...
@overload
def augment(
    x: torch.Tensor, kind: str, generator: torch.Generator, maps: None, ignore_index: int | None = None
) -> torch.Tensor: ...
@overload
def augment(
    x: torch.Tensor,
    kind: str,
    generator: torch.Generator,
    maps: torch.Tensor,
    ignore_index: int | None = None,
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
            photograph before that is made square. We deviate so that images are decoded the same way for
            every purpose, and augmented a batch at a time.
        generator: the only source of randomness, on the device of ``x``.
        maps: label maps (N, H, W) that move with the images.
        ignore_index: what comes into the maps at their edges; -100 if None.

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
        raise UserError(f"maps have shape {tuple(maps.shape)}: expected {(len(x), *x.shape[2:])}, one map an image")
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
    padded = F.pad(x, (PAD,) * 4, value=fill)
    # A strided view of all 9 x 9 crops of each image, (N, C, 9, 9, H, W); indexing copies one crop an image.
    windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    crops = windows[torch.arange(len(x), device=x.device), :, shifts[0], shifts[1]]
    if flips is None:
        return crops
    return torch.where(flips[:, None, None, None], crops.flip(-1), crops)
