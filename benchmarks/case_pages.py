"""Pages of text for case studies, rendered from the language reference that every Python brings (``pydoc_data``).

``python benchmarks/case_pages.py turned FOLDER`` writes an image folder of pages, each turned in four ways, ``lines
FOLDER`` a mask folder of lines. No two splits share a text. Labels are free: how far a page is turned, and which pixels
have ink.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from PIL import Image, ImageDraw, ImageFont

from gambeson.base import generator

PAGE, MARGIN, SIDE = (640, 900), 48, 224
COUNTS = {"train": 40, "validation": 10, "test": 40}
CROP, LINES = 192, {"train": 40, "validation": 5, "test": 15}
TURNS = {
    "000": None,
    "090": Image.Transpose.ROTATE_270,
    "180": Image.Transpose.ROTATE_180,
    "270": Image.Transpose.ROTATE_90,
}
"""By how many degrees a page is turned clockwise; in this order the network has them."""


def texts() -> Iterator[str]:
    """Passages of about a page, none of which is part of another."""
    for _, text in sorted(topics.items()):
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 66) or [""]]
        yield from ("\n".join(lines[at : at + 40]) for at in range(0, len(lines) - 20, 40))


def page(text: str, number: int) -> Image.Image:
    """Draw a page: size of letters, spacing, ink and paper are drawn from its number."""
    draw = generator(0, "page", number)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    paper, ink = between(225, 255), between(0, 60)
    picture = Image.new("RGB", PAGE, (paper, paper, paper))
    font = ImageFont.load_default(between(15, 19))
    ImageDraw.Draw(picture).multiline_text((MARGIN, MARGIN), text, (ink, ink, ink), font, spacing=between(4, 8))
    return picture


def lines(text: str, number: int) -> tuple[Image.Image, Image.Image]:
    """Draw some lines of large letters, and their mask: white where a line is, as high as its letters."""
    draw = generator(0, "lines", number)
    picture, mask = Image.new("RGB", (CROP, CROP), (255, 255, 255)), Image.new("L", (CROP, CROP), 0)
    size, top = int(torch.randint(14, 22, (), generator=draw)), 12
    font, pen, pencil = ImageFont.load_default(size), ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    ink = int(torch.randint(0, 90, (), generator=draw))
    for line in textwrap.wrap(text, 18):
        if top + size > CROP - 12:
            break
        pen.text((12, top), line, (ink, ink, ink), font)
        pencil.rectangle(pen.textbbox((12, top), line, font), 255)
        top += int(size * 1.9)
    return picture, mask


def write_lines(folder: Path) -> None:
    """Write a folder of images and masks of lines; a finished one is left as it is."""
    done = folder.with_suffix(".done")
    if done.is_file():
        return
    source = (text for text in texts() if len(text.split()) > 60)
    for split, count in LINES.items():
        for number in range(count):
            made = lines(" ".join(next(source).split()), 1000 * list(LINES).index(split) + number)
            for kind, one in zip(("images", "masks"), made, strict=True):
                place = folder / split / kind
                place.mkdir(parents=True, exist_ok=True)
                one.save(place / f"{number:03}.png")
    done.touch()


def side_by_side(file: Path, shown: dict[str, torch.Tensor], scale: int = 1) -> None:
    """Write images (C, H, W) in [0, 1] beside each other, each below its caption.

    Args:
        file: the picture.
        shown: captions, of which lines are separated by a line break, and images of one size.
        scale: pixels of the picture per pixel of an image.
    """
    high, wide = (scale * side for side in next(iter(shown.values())).shape[1:])
    font, gap = ImageFont.load_default(13), 12
    head = 6 + 17 * max(2, *(caption.count("\n") + 1 for caption in shown))
    picture = Image.new("RGB", (len(shown) * (wide + gap) - gap, high + head), (255, 255, 255))
    for k, (caption, image) in enumerate(shown.items()):
        bytes_ = (image.expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).contiguous()
        one = Image.fromarray(bytes_.numpy()).resize((wide, high), Image.Resampling.NEAREST)
        picture.paste(one, (k * (wide + gap), head))
        ImageDraw.Draw(picture).multiline_text((k * (wide + gap), 3), caption, (0, 0, 0), font, spacing=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(160).save(file, optimize=True)


def shortened(picture: Image.Image) -> Image.Image:
    """Scale the short side to 256 pixels and cut out the middle, as the network's package does."""
    scale = 256 / min(picture.size)
    wide, high = (round(side * scale) for side in picture.size)
    left, top = (wide - SIDE) // 2, (high - SIDE) // 2
    return picture.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + SIDE, top + SIDE))


def write_turned(folder: Path) -> None:
    """Write an image folder of pages, each turned in the four ways; a finished one is left as it is."""
    done = folder.with_suffix(".done")
    if done.is_file():
        return
    source = texts()
    for split, count in COUNTS.items():
        for number in range(count):
            upright = page(next(source), 1000 * list(COUNTS).index(split) + number)
            for name, turn in TURNS.items():
                place = folder / split / name
                place.mkdir(parents=True, exist_ok=True)
                turned = upright if turn is None else upright.transpose(turn)
                shortened(turned).save(place / f"{number:03}.png")
    done.touch()


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("turned", "lines"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    (write_turned if given.what == "turned" else write_lines)(given.folder)


if __name__ == "__main__":
    main()
