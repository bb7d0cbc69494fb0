"""The page about a patch: what it does at every place, scale and angle, beside controls; and its file for a printer."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from gambeson.attacks import AdversarialPatch
from gambeson.base import UserError, count, pixel_bytes, write_bytes
from gambeson.data import Split
from gambeson.evaluation.placement import PlacedRate, PlacementResult
from gambeson.evaluation.rates import strongest_control
from gambeson.report import pictures
from gambeson.report.formatting import Facts, flat, interval, of_hundred, percent
from gambeson.report.summary import squares
from gambeson.report.tables import NONE, Cell, Group, Line, Table, rate_cell

SHOWN = 8
"""Test images of the page, drawn."""


@dataclass(frozen=True)
class Page:
    """The page's data."""

    title: str
    setting: str
    answer: str
    comparison: str
    """With the strongest control."""
    squares: list[str]
    """Of the answer's 100 images, see :func:`gambeson.report.summary.squares`."""
    pattern: str
    """A picture of the patch."""
    examples: list[str]
    """Pictures of test images with the patch."""
    small: bool
    tables: list[Table]
    facts: list[Facts]


def build(patch: AdversarialPatch, found: PlacementResult, images: Split, seed: int) -> Page:
    """Build the page's data."""
    shape = patch.shape
    some = images.sample(min(SHOWN, len(images)), seed=seed)
    shown = pixel_bytes(patch.apply(some.take(slice(0, len(some)), "cpu")[0], seed))
    flat_patch = pixel_bytes((patch.pattern * patch.mask + 1 - patch.mask)[0])
    return Page(
        title=f"A patch of {100 * found.area:.2g} % on {images.name}",
        setting=f"{count(found.clean.n, 'test image')} of {shape[1]} x {shape[2]} pixels with one patch of "
        f"{' x '.join(map(str, patch.mask.shape[2:]))}. It was crafted for {patch.placement}.",
        answer=_answer(found),
        comparison=found.whole.comparison,
        squares=squares(found.whole.rate, found.clean),
        pattern=pictures.png(flat_patch),
        examples=[pictures.png(one) for one in shown],
        small=max(shape[1:]) <= 96,
        tables=[_places(found), _others(found)],
        facts=[Facts("Crafting", flat(patch.about.plain()))],
    )


def _answer(found: PlacementResult) -> str:
    does = "makes this model wrong on" if found.target is None else f"makes this model say {found.target} on"
    text = (
        f"One patch {does} {of_hundred(found.whole.rate.value)} of 100 images; "
        f"without it, on {of_hundred(found.clean.value)}."
    )
    control = strongest_control(found.whole.controls)
    if control is not None:
        text += f" The strongest control ({control.name}) does so on {of_hundred(control.worst.value)}."
    return text


def _places(found: PlacementResult) -> Table:
    def cell(one: PlacedRate) -> Cell:
        beside = () if one.control is None else (f"control {percent(one.control.value)}",)
        shade = f"rgba(196, 80, 10, {0.6 * one.rate.value:.2f})"
        return Cell(percent(one.rate.value), (interval(one.rate), *beside), shade=shade)

    count_ = len(found.places)
    heads = [f"{100 * k / max(1, count_ - 1):.0f} % from the left" for k in range(count_)]
    lines = [
        Line(f"{100 * k / max(1, count_ - 1):.0f} % from the top", "", [cell(one) for one in row])
        for k, row in enumerate(found.places)
    ]
    note = "At 0 % the patch touches one edge, at 100 % the other. The darker, the worse for the model."
    return Table(f"{found.what} by place", ["Patch", *heads], [Group(None, lines)], note)


def _others(found: PlacementResult) -> Table:
    def line(name: str, note: str, one: PlacedRate) -> Line:
        control = NONE if one.control is None else rate_cell(one.control)
        lead = NONE if one.lead is None else Cell(f"{100 * one.lead.value:+.1f}", (interval(one.lead),))
        return Line(name, note, [rate_cell(one.rate), control, lead])

    lines = [Line("no patch", "clean images", [rate_cell(found.clean), NONE, NONE], minor=True)]
    lines.append(line("as crafted", str(found.placement), found.whole))
    lines += [line(f"scale {one.at:g}", "", one) for one in found.scales]
    lines += [line(f"turned by {one.at:g} degrees", "", one) for one in found.rotations]
    heads = ["Patch", found.what, "strongest control", "lead, points"]
    return Table(f"{found.what} by scale and angle", heads, [Group(None, lines)])


_UNITS = {"mm": 1.0, "cm": 10.0, "in": 25.4}
_MARK, _GAP = 4.0, 1.5
"""Length of a crop mark, and its distance from the patch, in mm (ours)."""


def print_patch(
    patch: AdversarialPatch, out: str | Path, size: str, dpi: int = 300, *, marks: bool = True
) -> tuple[int, int]:
    """Write a patch for a printer, every pixel of it a square, with its physical size in the file and beside it.

    Outside its mask a PNG is transparent and a PDF white. Neither knows what a printer makes of the colours.

    Args:
        patch: the patch.
        out: a file that ends in .png or .pdf.
        size: of its longer side, such as ``50mm``, ``5cm`` or ``2in``.
        dpi: dots per inch.
        marks: surround it by crop marks, which point to its corners, and write its size below; otherwise the picture
            is the patch alone.

    Returns:
        Height and width of the patch in dots.

    Raises:
        UserError: another size or ending, more or less dots than a printer has a use for, or channels without colours.
    """
    out, found = Path(out), re.fullmatch(r"([0-9]*\.?[0-9]+) ?(mm|cm|in)", size.strip())
    if found is None:
        raise UserError(f"--print {size}: expected the length of the longer side with its unit, such as 50mm or 2in")
    if out.suffix not in (".png", ".pdf"):
        raise UserError(f"{out} is no file for a printer: name one that ends in .png or .pdf")
    channels, *sides = patch.pattern.shape[1:]
    if channels not in (1, 3):
        raise UserError(f"a patch of {channels} channels has no colours to print: expected 1 or 3")
    dots = float(found[1]) * _UNITS[found[2]] / 25.4 * dpi / max(sides)
    if not 1 <= dots <= 20_000 / max(sides):
        raise UserError(
            f"{size} at {dpi} dpi is {dots * max(sides):.0f} dots for {max(sides)} pixels: expected from one dot per "
            "pixel to 20,000 in all"
        )
    height, width = (round(dots * side) for side in sides)
    layers = pixel_bytes(torch.cat([patch.pattern[0].expand(3, -1, -1), patch.mask[0]]).cpu())
    picture = Image.fromarray(layers.permute(1, 2, 0).contiguous().numpy(), "RGBA")
    picture = picture.resize((width, height), Image.Resampling.NEAREST)
    if marks:
        picture = _with_marks(picture, dpi, found[2])
    content = io.BytesIO()
    if out.suffix == ".pdf":
        page = Image.new("RGB", picture.size, "white")
        page.paste(picture, mask=picture.getchannel("A"))
        page.save(content, "PDF", resolution=dpi, quality=100, subsampling=0)  # JPEG, whose loss is below a level
    else:
        picture.save(content, "PNG", dpi=(dpi, dpi))
    write_bytes(out, content.getvalue())
    return height, width


def _with_marks(picture: Image.Image, dpi: int, unit: str) -> Image.Image:
    """Surround a picture by crop marks at its four corners, and write its width and height below."""
    gap, mark, line = (max(1, round(length / 25.4 * dpi)) for length in (_GAP, _MARK, 0.1))
    edge, (width, height) = gap + mark, picture.size
    told = " x ".join(f"{round(side / dpi * 25.4 / _UNITS[unit], 1 + (unit != 'mm')):g}" for side in picture.size)
    font = ImageFont.load_default(max(8, round(3 / 25.4 * dpi)))
    text = f"{told} {unit}: print at 100 %, {dpi} dpi"
    left, top, right, bottom = font.getbbox(text)
    size = max(width + edge, round(right - left)) + edge + gap, height + 2 * (edge + gap) + round(bottom - top)
    page = Image.new("RGBA", size, (255, 255, 255, 0))
    page.paste(picture, (edge, edge))
    draw = ImageDraw.Draw(page)
    for x in (edge - line, edge + width):  # the marks' inner edges are the patch's
        for y in (0, edge + height + gap):
            draw.rectangle((x, y, x + line - 1, y + mark - 1), "black")
    for y in (edge - line, edge + height):
        for x in (0, edge + width + gap):
            draw.rectangle((x, y, x + mark - 1, y + line - 1), "black")
    draw.text((edge - left, height + 2 * edge + gap - top), text, "black", font)
    return page
