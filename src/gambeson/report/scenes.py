"""Label maps inside the page: images, truth, predictions and patterns side by side, and the IoU of every class."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from gambeson.auditing.results import IoU, TargetedResult
from gambeson.base import eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.targeted import SHUFFLED, Reached
from gambeson.report.formatting import of_hundred, percent
from gambeson.report.loading import Folder
from gambeson.report.pictures import Pattern, pattern, png
from gambeson.report.tables import NONE, Cell, Group, Line, Table, rate_cell

PALETTE = (
    *("#d5d9e0", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#332288", "#882255"),
    *("#999933", "#661100", "#44aa99", "#aa4499", "#117733", "#ddcc77", "#6699cc", "#cc6677", "#5d3a1a", "#88ccee"),
)
"""Colours of classes, in order of their index: those of Okabe and Ito, and of Tol, which people with any of the common
kinds of colour blindness can tell apart as far as so many can be. Class 0, the ground, is grey. More classes begin
anew, each time darker."""
UNLABELLED = "#ffffff"
"""Colour of pixels without a label that counts, or without a majority of votes."""
_WIDEST = 256
"""Pixels of a side beyond which pictures leave out rows and columns."""
_NAMED = 4
_AIMED = 4
"""Images that a pattern with a target is shown on."""
_DARKER = 0.6


def colour(index: int) -> str:
    """Return the colour of a class."""
    again, place = divmod(index, len(PALETTE))
    parts = (int(PALETTE[place][k : k + 2], 16) * _DARKER**again for k in (1, 3, 5))
    return "#" + "".join(f"{round(part):02x}" for part in parts)


@dataclass(frozen=True)
class Picture:
    """A picture with its alternative text."""

    source: str
    alt: str


@dataclass(frozen=True)
class Frame:
    """A scene under the pattern of one eps."""

    image: Picture
    prediction: Picture
    count: str
    """Pixels that are wrong, or that are taken for their target, of 100."""


@dataclass(frozen=True)
class ShownScene:
    """A test image with its truth, and what the model sees in it without a pattern and under each."""

    image: Picture
    truth: Picture
    prediction: Picture
    wrong: str
    target: Picture | None
    frames: list[Frame]


@dataclass(frozen=True)
class Scenes:
    """Test images of one model, under patterns that a slider goes through."""

    title: str
    patterns: list[Pattern]
    said: list[str]
    """What each pattern does to all test images."""
    middle: int
    """The pattern that is shown first."""
    scenes: list[ShownScene]
    side: tuple[int, int]
    """Width and height of a picture of a pattern."""
    note: str
    """How the images were chosen."""


@dataclass(frozen=True)
class Swatch:
    """An entry of the legend."""

    name: str
    colour: str


def legend(folders: Sequence[Folder]) -> list[Swatch]:
    """Return the classes with their colours; empty where labels are no maps."""
    if folders[0].unit == "image":
        return []
    classes = folders[0].result.material.classes
    return [*(Swatch(name, colour(k)) for k, name in enumerate(classes)), Swatch("no label", UNLABELLED)]


def build(folder: Folder, patterns: list[Pattern], norm: str) -> list[Scenes]:
    """Draw the stored test images of an audit; empty where labels are no maps."""
    if folder.unit == "image" or "curve" not in folder.examples:
        return []
    result, tensors = folder.result, folder.examples
    said = []
    for point in result.universal:
        text = f"eps {eps_text(point.eps)}: wrong on {of_hundred(point.uer.value)} of 100 pixels"
        said.append(text + (f", mean IoU {percent(point.iou.mean.value)}" if point.iou else ""))
    classes, (height, width) = result.material.classes, result.material.shape[1:]
    found = [
        Scenes(
            title="",
            patterns=patterns,
            said=said,
            middle=len(patterns) // 2,
            scenes=_scenes(tensors, tensors["curve"], tensors["curve_predictions"], classes),
            side=(width, height),
            note=_note(tensors, folder),
        )
    ]
    for one, delta in zip(result.targeted, folder.aimed, strict=True):
        kind = one.target.partition(":")[0]
        if kind not in tensors:
            continue
        moved, predictions = (tensors[f"{kind}_{what}"][None] for what in ("images", "predictions"))
        found.append(
            Scenes(
                title=_aim(one),
                patterns=[pattern(delta, one.eps, norm, folder.label, "")],
                said=[_reached(one)],
                middle=0,
                scenes=_scenes(tensors, moved, predictions, classes, tensors[kind])[:_AIMED],
                side=(width, height),
                note="",
            )
        )
    return found


def _aim(found: TargetedResult) -> str:
    kind, _, name = found.target.partition(":")
    return f"A pattern that hides the class {name}" if kind == "hide" else "A pattern that shows one chosen scene"


def _reached(found: TargetedResult) -> str:
    reached = found.reached
    said = f"eps {eps_text(found.eps)}: "
    if reached.hidden is None or reached.kept is None:
        said += f"{of_hundred(reached.success.value)} of 100 pixels are taken for the target, {_clean(reached.clean)}"
        chance = next((one for one in reached.controls if one.name == SHUFFLED), None)
        return said + ("." if chance is None else f" and {of_hundred(chance.success.value)} for other scenes' maps.")
    hidden, kept = of_hundred(reached.hidden.value), of_hundred(reached.kept.value)
    return f"{said}{hidden} of 100 of its pixels are hidden, and {kept} of 100 others are kept."


def _clean(rate: Rate) -> str:
    return f"{of_hundred(rate.value)} without the pattern"


def aims(folders: Sequence[Folder]) -> Table | None:
    """Build a table of the targets, with what is reached by the pattern, by controls and by chance."""
    groups = []
    for k, folder in enumerate(folders):
        lines = []
        for one in folder.result.targeted:
            kind, _, name = one.target.partition(":")
            title = f"to hide {name}" if kind == "hide" else f"to show scene {name}"
            lines.append(Line(title, f"crafted, eps {eps_text(one.eps)}", _cells(one.reached)))
            lines.append(Line("clean images", "", [rate_cell(one.reached.clean), NONE, NONE], minor=True))
            lines += [
                Line(control.name.replace("-", " "), "", _cells(control), minor=True)
                for control in one.reached.controls
            ]
        if lines:
            groups.append(Group(k, lines))
    head = ["Pattern", "Pixels that show the target", "Hidden of the class", "Kept of all others"]
    note = "The shuffled target map is the same pattern held against the target maps of other images: chance."
    return Table("Patterns that aim at a target", head, groups, note) if groups else None


def _scenes(
    tensors: Mapping[str, torch.Tensor],
    moved: torch.Tensor,
    predictions: torch.Tensor,
    classes: Sequence[str],
    targets: torch.Tensor | None = None,
) -> list[ShownScene]:
    """Draw every scene under every pattern: ``moved`` (E, K, C, H, W), ``predictions`` (E, K, H, W)."""
    labels = tensors["labels"].long()

    def mask(values: torch.Tensor, kind: str) -> Picture:
        return Picture(_painted(values.long()), f"{kind}: {_words(values.long(), classes)}")

    found = []
    for k, label in enumerate(labels):
        frames = [
            Frame(
                image=Picture(_shown(moved[e, k]), f"Test image {k + 1} with the pattern"),
                prediction=mask(predictions[e, k], f"Prediction for image {k + 1} with the pattern"),
                count=_of_pixels(predictions[e, k], label, len(classes), None if targets is None else targets[k]),
            )
            for e in range(len(moved))
        ]
        clean = tensors["predictions"][k]
        found.append(
            ShownScene(
                image=Picture(_shown(tensors["images"][k]), f"Test image {k + 1}"),
                truth=mask(label, f"Truth of image {k + 1}"),
                prediction=mask(clean, f"Prediction for image {k + 1} without a pattern"),
                wrong=_of_pixels(clean, label, len(classes)),
                target=None if targets is None else mask(targets[k], f"Target for image {k + 1}"),
                frames=frames,
            )
        )
    return found


def _valid(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return (labels >= 0) & (labels < classes)


def _share(predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    valid = _valid(labels, classes)
    return int(((predictions != labels) & valid).sum()) / max(1, int(valid.sum()))


def _of_pixels(prediction: torch.Tensor, label: torch.Tensor, classes: int, target: torch.Tensor | None = None) -> str:
    """Say how many pixels of 100 are wrong, or with a target, are taken for it."""
    if target is None:
        return of_hundred(_share(prediction, label, classes))
    return of_hundred(1 - _share(prediction, target, classes))


def _note(tensors: Mapping[str, torch.Tensor], folder: Folder) -> str:
    result = folder.result
    labels, classes = tensors["labels"].long(), len(result.material.classes)
    under, before = (of_hundred(_share(tensors[name], labels, classes)) for name in _BOTH)
    return (
        f"These {len(labels)} stand for all {result.material.test:,}: from easy to hard, their errors at eps "
        f"{eps_text(result.middle.eps)} are spread as those of all are. There the model gets {under} of 100 of their "
        f"pixels wrong with the pattern and {before} without it; of all, {of_hundred(result.middle.uer.value)} and "
        f"{of_hundred(result.clean.complement.value)}."
    )


_BOTH = ("perturbed_predictions", "predictions")


def _words(values: torch.Tensor, classes: Sequence[str]) -> str:
    """Name the classes that cover most of a map, with their shares."""
    counts = values[_valid(values, len(classes))].flatten().bincount(minlength=len(classes))
    order = counts.argsort(descending=True, stable=True)[:_NAMED].tolist()
    total = max(1, int(counts.sum()))
    return ", ".join(f"{classes[k]} {100 * int(counts[k]) / total:.0f} %" for k in order if counts[k]) or "no label"


def _stride(pixels: torch.Tensor) -> int:
    return -(-max(pixels.shape[-2:]) // _WIDEST)


def _shown(pixels: torch.Tensor) -> str:
    step = _stride(pixels)
    return png(pixels[:, ::step, ::step])


def _painted(values: torch.Tensor) -> str:
    """Return a PNG data URI of a label map (H, W), in the colours of its classes."""
    step = _stride(values)
    values = values[::step, ::step]
    present = values.unique().tolist()
    picture = Image.fromarray(torch.bucketize(values, torch.tensor(present)).to(torch.uint8).numpy(), "P")
    picture.putpalette([int(_colour_of(value)[k : k + 2], 16) for value in present[:256] for k in (1, 3, 5)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour_of(value: int) -> str:
    return UNLABELLED if value < 0 else colour(value)


def _cells(found: Reached) -> list[Cell]:
    return [NONE if rate is None else rate_cell(rate) for rate in (found.success, found.hidden, found.kept)]


def ious(folders: Sequence[Folder]) -> Table | None:
    """Build, for each model, the mean IoU and that of every class, clean and over all eps; None without label maps."""
    if folders[0].unit == "image":
        return None
    radii = sorted({point.eps for folder in folders for point in folder.result.universal})
    groups = []
    for k, folder in enumerate(folders):
        points = {point.eps: point.iou for point in folder.result.universal}
        row = [folder.result.iou, *(points.get(eps) for eps in radii)]
        lines = [Line("mean IoU", "over the classes below", [_mean(found) for found in row])]
        lines += [
            Line(name, "", [_class(found, name) for found in row], minor=True)
            for name in folder.result.material.classes
            if folder.result.iou and name in folder.result.iou.classes
        ]
        groups.append(Group(k, lines))
    head = ["Class", "clean", *(f"eps {eps_text(eps)}" for eps in radii)]
    return Table("IoU of every class, clean and under the pattern of every eps", head, groups)


def _mean(found: IoU | None) -> Cell:
    return NONE if found is None else rate_cell(found.mean)


def _class(found: IoU | None, name: str) -> Cell:
    return NONE if found is None or name not in found.classes else rate_cell(found.classes[name])
