"""The page about a patch: what it does at every place, scale and angle, beside controls of the same mask."""

from __future__ import annotations

from dataclasses import dataclass

from gambeson.attacks import AdversarialPatch
from gambeson.base import pixel_bytes
from gambeson.data import Split
from gambeson.evaluation.placement import PlacedRate, PlacementResult
from gambeson.evaluation.rates import strongest_control
from gambeson.report import pictures
from gambeson.report.formatting import Facts, count, flat, interval, of_hundred, percent
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
        if found.whole.rate.low <= control.worst.high:
            text += " The patch is not clearly stronger than that."
    return text


def _places(found: PlacementResult) -> Table:
    def cell(one: PlacedRate) -> Cell:
        beside = () if one.control is None else (f"control {percent(one.control.value)}",)
        shade = f"rgba(196, 80, 10, {0.6 * one.rate.value:.2f})"
        return Cell(percent(one.rate.value), (interval(one.rate), *beside), shade=shade)

    count_ = len(found.places)
    heads = [f"{k / max(1, count_ - 1):.0%} from the left" for k in range(count_)]
    lines = [
        Line(f"{k / max(1, count_ - 1):.0%} from the top", "", [cell(one) for one in row])
        for k, row in enumerate(found.places)
    ]
    note = "At 0 % the patch touches one edge, at 100 % the other. The darker, the worse for the model."
    return Table(f"{found.what} by place", ["Patch", *heads], [Group(None, lines)], note)


def _others(found: PlacementResult) -> Table:
    def line(name: str, note: str, one: PlacedRate) -> Line:
        control = NONE if one.control is None else rate_cell(one.control)
        return Line(name, note, [rate_cell(one.rate), control])

    lines = [Line("no patch", "clean images", [rate_cell(found.clean), NONE], minor=True)]
    lines.append(line("as crafted", str(found.placement), found.whole))
    lines += [line(f"scale {one.at:g}", "", one) for one in found.scales]
    lines += [line(f"turned by {one.at:g} degrees", "", one) for one in found.rotations]
    return Table(f"{found.what} by scale and angle", ["Patch", found.what, "worst control"], [Group(None, lines)])
