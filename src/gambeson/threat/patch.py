"""Patches and stickers: pixels that are replaced under a mask, at a place, size and angle drawn for each image.

No norm ball: the values under the mask are free in [0, 1], all others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field

from gambeson.base import Config, Number, UserError, generator, one_line
from gambeson.base.pictures import open_picture
from gambeson.tasks import Task

Share = Annotated[Number, Field(ge=0, le=1)]


def _place(value: Any) -> Any:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
    if value in ("random", "corner") or (pair and all(0 <= one <= 1 for one in value)):
        return value
    raise ValueError("expected random, corner, or (y, x), two shares from 0 to 1 of the way through the image")


Place = Annotated[Literal["random", "corner"] | tuple[Share, Share], BeforeValidator(_place)]
"""Where a patch lies, always wholly within the image: anywhere, with equal probability; in one of the four corners; or
at (y, x), shares of the way from the top to the bottom and from the left to the right: (0.5, 0.5) is the middle."""


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("expected the smaller value first")
    return value


Scales = Annotated[
    tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]],
    BeforeValidator(lambda value: (value, value) if isinstance(value, int | float) else value),
    AfterValidator(_ordered),
]
"""Least and largest factor of a patch's sides; a number alone is both."""


def _both_ways(value: Any) -> Any:
    if not isinstance(value, int | float):
        return value
    if not 0 <= value <= 180:
        raise ValueError("expected 0 to 180 degrees, in both directions, or the least and the largest angle")
    return -value, value


Angle = Annotated[Number, Field(ge=-180, le=180)]
Angles = Annotated[
    tuple[Angle, Angle],
    BeforeValidator(_both_ways),
    AfterValidator(_ordered),
]
"""Least and largest angle in degrees; a number alone is meant in both directions."""


class Placement(Config):
    """How a patch is placed in each image, drawn independently and uniformly for each (Brown et al. 2017).

    Without scaling and turning it lies on whole pixels and its values are kept exactly; otherwise values and mask are
    interpolated bilinearly, without antialiasing.
    """

    place: Place = "random"
    """See :data:`Place`."""
    scale: Scales = (1.0, 1.0)
    """See :data:`Scales`."""
    rotation: Angles = (0.0, 0.0)
    """See :data:`Angles`."""

    def __str__(self) -> str:
        place = self.place if isinstance(self.place, str) else f"({self.place[0]:g}, {self.place[1]:g})"
        return f"place {place}, scale {_range(*self.scale)}, rotation {_range(*self.rotation)}"

    @property
    def on_pixels(self) -> bool:
        """Whether a patch lies on whole pixels."""
        return self.scale == (1, 1) and self.rotation == (0, 0)

    def needs(self, size: Sequence[int]) -> tuple[float, float]:
        """Return the height and width of the largest bounding rectangle of a patch of ``size`` (height, width)."""
        low, high = (math.radians(angle) for angle in self.rotation)

        def largest(own: float, other: float) -> float:
            highest = math.atan2(other, own)  # the angle of the diagonal, and those that mirror it
            angles = [k * math.pi + sign * highest for k in (-1, 0, 1) for sign in (1, -1)]
            tried = [low, high, *(angle for angle in angles if low <= angle <= high)]
            return self.scale[1] * max(own * abs(math.cos(a)) + other * abs(math.sin(a)) for a in tried)

        return largest(*size), largest(*reversed(size))

    def thetas(self, size: Sequence[int], image: Sequence[int], drawn: torch.Tensor) -> torch.Tensor:
        """Return the maps from an image's coordinates to a patch's that ``torch.nn.functional.affine_grid`` takes.

        Args:
            size: height and width of the patch.
            image: height and width of the images.
            drawn: (N, 4) uniform in [0, 1): for y, x, scale and rotation.

        Returns:
            (N, 2, 3) float64.
        """
        drawn = drawn.double()
        scale, angle = (low + (high - low) * drawn[:, k] for k, (low, high) in ((2, self.scale), (3, self.rotation)))
        angle = torch.deg2rad(angle)
        cos, sin = angle.cos(), angle.sin()
        (h, w), (height, width) = size, image
        reach = torch.stack([h * cos.abs() + w * sin.abs(), w * cos.abs() + h * sin.abs()], 1) * scale[:, None]
        free = (drawn.new_tensor([height, width]) - reach).clamp(min=0)
        if self.place == "random" and self.on_pixels:
            corner = (drawn[:, :2] * (free + 1)).floor().minimum(free)
        else:
            share = drawn[:, :2]
            if self.place == "corner":
                share = (share >= 0.5).double()
            elif self.place != "random":
                share = drawn.new_tensor(self.place).expand_as(share)
            corner = (share * free).round() if self.on_pixels else share * free
        y, x = (corner + reach / 2 - drawn.new_tensor([height, width]) / 2).unbind(1)  # of its centre, from the image's
        rows = [
            torch.stack([width * cos, height * sin, -2 * (cos * x + sin * y)], 1) / (w * scale)[:, None],
            torch.stack([-width * sin, height * cos, 2 * (sin * x - cos * y)], 1) / (h * scale)[:, None],
        ]
        return torch.stack(rows, 1)


@dataclass(frozen=True)
class Patch:
    """A patch, or several, and how they are placed."""

    pattern: torch.Tensor
    """(R, C, h, w) in [0, 1]."""
    mask: torch.Tensor
    """(1, 1, h, w) in [0, 1]: the share of the pattern at each pixel; the rest is the image's own."""
    placement: Placement

    @property
    def device(self) -> torch.device:
        """Device of the pattern."""
        return self.pattern.device

    def to(self, device: torch.device | str) -> Patch:
        """Return it on a device."""
        return Patch(self.pattern.to(device), self.mask.to(device), self.placement)

    def draw(self, images: int, draw: torch.Generator) -> torch.Tensor:
        """Draw the placements of so many images, (N, 4); they do not depend on how a split is cut into batches."""
        return torch.rand((images, 4), generator=draw, device=draw.device)

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return images with the patch, differentiable in its pattern.

        Args:
            images: (N, C, H, W) in [0, 1]; R divides N, and each pattern is on N / R consecutive ones.
            drawn: what :meth:`draw` returned for them.

        Returns:
            (N, C, H, W) in [0, 1]; bit-identical to ``images`` where the mask is zero.
        """
        thetas = self.placement.thetas(self.mask.shape[2:], images.shape[2:], drawn).to(images)
        grid = F.affine_grid(thetas, list(images.shape), align_corners=False)
        mask = self.mask.to(images).expand(len(self.pattern), -1, -1, -1)
        layers = torch.cat([self.pattern * mask, mask], 1).repeat_interleave(len(images) // len(self.pattern), 0)
        mode = "nearest" if self.placement.on_pixels else "bilinear"
        seen = F.grid_sample(layers, grid, mode, "zeros", align_corners=False)
        covered, share = seen[:, :-1], seen[:, -1:]
        mixed = covered + (1 - share) * images
        return torch.where(share > 0, mixed + (mixed.clamp(0, 1) - mixed).detach(), images)  # rounding alone is cut

    def seeded(self, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that puts the patch on one batch after another, by the next placements of the seed.

        Patches of the same placement, such as a control beside what was crafted, are placed alike.
        """
        draw = generator(seed, "placement", str(self.placement))
        return lambda images: self(images, self.draw(len(images), draw))

    def require_fit(self, shape: Sequence[int], task: Task) -> None:
        """Refuse images of ``shape`` (C, H, W), or labels, that a patch has no place on.

        Raises:
            UserError: label maps, other channels, or a patch that is larger than an image.
        """
        if not task.per_image_label:
            raise UserError(
                "a patch hides what a label map tells of the pixels under it, and no rate would be fair: patches need "
                "images with one label each"
            )
        if self.pattern.shape[1] != shape[0]:
            raise UserError(
                f"a patch of {self.pattern.shape[1]} channels came with images of {shape[0]}: expected the same"
            )
        require_room(self.mask.shape[2:], shape[1:], self.placement)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def require_room(size: Sequence[int], image: Sequence[int], placement: Placement) -> None:
    """Refuse a patch that does not always lie within an image.

    Args:
        size: its height and width.
        image: those of the images.
        placement: its placement.

    Raises:
        UserError: it may be larger than the image.
    """
    height, width = placement.needs(size)
    if height > image[0] + 1e-6 or width > image[1] + 1e-6:
        turned = "" if placement.on_pixels else ", scaled and turned as it may be,"
        raise UserError(
            f"a patch of {size[0]}x{size[1]} pixels{turned} takes up to {math.ceil(height - 1e-6)}x"
            f"{math.ceil(width - 1e-6)}, and the images have {image[0]}x{image[1]}: give a smaller area, scale or "
            "rotation"
        )


def mask_of(shape: str, area: float, image: Sequence[int]) -> torch.Tensor:
    """Return the mask of a patch, (1, 1, h, w) in [0, 1], of the whole number of pixels that is nearest to an area.

    Args:
        shape: ``square``, ``circle``, or the file of a picture with transparency, whose opaque part is the sticker;
            it is cut to that part, and resized with its proportions.
        area: share of the image.
        image: height and width of the images.

    Raises:
        UserError: another shape, a picture that cannot be read or has no transparency, or less than a pixel.
    """
    pixels = area * image[0] * image[1]
    if pixels < 1:
        raise UserError(
            f"an area of {area:g} is {pixels:.2g} pixels of images of {image[0]}x{image[1]}: expected one or more"
        )
    if shape == "square":
        side = round(pixels**0.5)
        return torch.ones(1, 1, side, side)
    if shape == "circle":
        side = max(1, round((4 / math.pi * pixels) ** 0.5))
        away = (torch.arange(side) - (side - 1) / 2).square()
        return (away[:, None] + away <= (side / 2) ** 2).float()[None, None]
    alpha = _alpha(Path(shape))
    factor = (pixels / (np.asarray(alpha).mean() / 255) / (alpha.width * alpha.height)) ** 0.5
    size = max(1, round(factor * alpha.width)), max(1, round(factor * alpha.height))
    return torch.from_numpy(np.array(alpha.resize(size, Image.Resampling.BILINEAR)))[None, None].float() / 255


def _alpha(file: Path) -> Any:
    """Return how opaque a picture is, cut to what is not transparent."""
    try:
        with open_picture(file) as picture:
            if not picture.has_transparency_data:
                raise UserError(
                    f"the sticker {file} has no transparency, which says where it is: save it as a PNG with an alpha "
                    "channel, or choose the shape square or circle"
                )
            alpha = picture.convert("RGBA").getchannel("A")
    except OSError as error:
        raise UserError(
            f"shape {str(file)!r}: expected square, circle, or the file of a picture with transparency "
            f"({one_line(error)})"
        ) from None
    box = alpha.getbbox()
    if box is None:
        raise UserError(f"the sticker {file} is transparent everywhere: expected a picture with an opaque part")
    return alpha.crop(box)
