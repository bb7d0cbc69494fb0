"""Pictures as images: one stated rule for each depth, mode, transparency, orientation and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from gambeson.base.config import Config, Number
from gambeson.base.errors import UserError

Shape = tuple[int | None, int | None, int | None]
"""Channels, height and width that a model takes; None where it takes any."""


class ImageOptions(Config):
    """How pictures are read; in a name ``?size=64,mode=grey``."""

    size: Annotated[int, Field(ge=1)] | None = None
    """Side of the square, in pixels, that images are resized (shorter side) and centre-cropped to."""
    mode: Literal["rgb", "grey"] | None = None
    """Three channels or one."""
    order: Literal["text", "number"] | None = None
    """Order of class folders: as text, which is torchvision's and the default, or by the numbers in their names."""
    nested: Literal["refuse", "flat"] = "refuse"
    """What to do with folders inside class folders: refuse them, or take everything below as that class."""
    white: Annotated[Number, Field(gt=0)] | None = None
    """Value of white in pictures of more than 8 bits: 4095 for 12 bits in a 16-bit file."""
    alpha: Literal["drop", "white", "black"] | None = None
    """What transparent pixels become: the colour stored under them (torchvision's choice), or a background."""

    def decoder(self, size: tuple[int, int] | None = None) -> Decoder:
        """Return the decoder of pictures that are not in class folders.

        Args:
            size: height and width where the options name no size; None keeps those of the pictures.

        Raises:
            UserError: an option that is about folders.
        """
        if unfit := self.model_fields_set & {"order", "nested"}:
            raise UserError(
                f"{' and '.join(sorted(unfit))} is for class folders, and these data have none: leave it out"
            )
        size = size if self.size is None else (self.size, self.size)
        return Decoder(size, None if self.mode is None else self.mode == "grey", self.white, self.alpha)


@dataclass(frozen=True)
class Header:
    """What a picture's header says."""

    height: int
    width: int
    grey: bool
    depth: str
    """``16-bit``, ``32-bit integer``, ``float``; empty for 8 bits or fewer, and where the file states its white."""
    frames: int


def read_header(picture: Image.Image) -> Header:
    """Read a picture's header; its size is that of the upright picture."""
    grey = picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16")
    # PIL turns TIFFs itself, and would decode a PNG without EXIF data to look for some at its end.
    known = picture.format != "TIFF" and (picture.format != "PNG" or "exif" in picture.info)
    turned = known and picture.getexif().get(0x0112, 1) >= 5
    width, height = picture.size[::-1] if turned else picture.size
    return Header(height, width, grey, depth(picture), getattr(picture, "n_frames", 1))


def depth(picture: Image.Image) -> str:
    """Return the kind of a picture of more than 8 bits per channel, see :class:`Header`."""
    if picture.mode == "F":
        return "float"
    if picture.mode == "I":
        return "" if picture.format == "PPM" else "32-bit integer"  # PIL scales PGM by the white in its header
    tiles = getattr(picture, "tile", ()) if picture.format in ("PNG", "TIFF") else ()
    deep = picture.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in tiles)
    return "16-bit" if deep else ""


def levels(picture: Image.Image, what: str) -> np.ndarray[Any, Any]:
    """Return the values of a picture of more than 8 bits, upright, (H, W) or (H, W, C), float64.

    Raises:
        UserError: PIL would cut its channels to 8 bits, and no other reader is here.
    """
    if depth(picture) == "16-bit" and not picture.mode.startswith("I"):
        if picture.format != "PNG":
            raise UserError(f"{what} has 16 bits in each channel of a {picture.format}: convert it to PNG or to 8 bits")
        from torchvision.io import decode_image

        stream: Any = picture.fp  # type: ignore[attr-defined]
        stream.seek(0)
        blob = torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8)
        return decode_image(blob, "UNCHANGED", apply_exif_orientation=True).permute(1, 2, 0).numpy().astype(np.float64)
    return np.asarray(ImageOps.exif_transpose(picture)).astype(np.float64)


@dataclass(frozen=True)
class Decoder:
    """Turns pictures into uint8 images (C, H, W): upright, opaque, of 8 bits, in one mode and one size.

    Raises:
        UserError: more than 8 bits whose white is unknown, values outside 0 to white, or transparent pixels without a
            rule for them.
    """

    size: tuple[int, int] | None = None
    """Height and width; None keeps those of the picture."""
    grey: bool | None = None
    """One channel or three; None: as the picture has them."""
    white: float | None = None
    alpha: str | None = None

    def __call__(self, picture: Image.Image, what: str) -> torch.Tensor:
        """Decode a picture, called ``what`` in errors."""
        kind = depth(picture)
        if kind and "transparency" in picture.info and self.alpha != "drop":
            raise UserError(
                f"{what} is a {kind} picture in which one colour is transparent: choose alpha=drop for the colours "
                "stored under it, or convert it to 8 bits"
            )
        if kind or picture.mode == "I":
            picture = self._eight_bits(picture, kind, what)
        else:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
            picture = self._opaque(picture, what)
        grey = picture.mode in ("1", "L") if self.grey is None else self.grey
        pixels = torch.from_numpy(np.array(picture.convert("L" if grey else "RGB")))
        return fit(pixels[None] if grey else pixels.permute(2, 0, 1).contiguous(), self.size)

    def _eight_bits(self, picture: Image.Image, kind: str, what: str) -> Image.Image:
        white = self.white or {"": 65535.0, "float": 1.0}.get(kind)
        if white is None:
            raise UserError(f"{what} is a {kind} picture: say which value is white, such as white=65535 or white=4095")
        values = levels(picture, what)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= white):  # nan among them
            raise UserError(
                f"{what} is a {kind} picture with values from {low:g} to {high:g}: expected 0 to {white:g}; say which "
                "value is white by white=, or convert it"
            )
        if getattr(picture, "tag_v2", {}).get(262) == 0:  # zero is white, which PIL heeds in 8-bit TIFFs only
            values = white - values
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))

    def _opaque(self, picture: Image.Image, what: str) -> Image.Image:
        own, picture = picture.mode, picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255) and self.alpha != "drop":
            if self.alpha is None:
                raise UserError(
                    f"{what} has transparent pixels: choose alpha=drop for the colours stored under them, which "
                    "torchvision reads, or a background by alpha=white or alpha=black"
                )
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, self.alpha), picture)
        return picture.convert("L" if own in ("1", "L", "LA", "La") else "RGB")


def fit(image: torch.Tensor, size: tuple[int, int] | None, *, nearest: bool = False) -> torch.Tensor:
    """Resize an image (C, H, W) or a map (H, W) to cover ``size`` and centre-crop it; None changes nothing."""
    if size is None or tuple(image.shape[-2:]) == size:
        return image
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width, (rows, columns) = image.shape[-2], image.shape[-1], size
    tall = height * columns >= width * rows  # the width decides
    cover = [columns * height // width, columns] if tall else [rows, rows * width // height]
    how = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
    planes = functional.resize(image[None] if nearest else image, cover, interpolation=how, antialias=not nearest)
    planes = functional.center_crop(planes, list(size))
    return planes[0] if nearest else planes
