"""How the pixels of a model that someone else trained are normalised: what a name asks for, and what the data say."""

from __future__ import annotations

import math
import warnings

import torch

from gambeson.base import UserError, seeded
from gambeson.data import Dataset, Split
from gambeson.models.pixel_model import Normalize, PixelModel
from gambeson.tasks import Rate
from gambeson.tasks.task import answers

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that torchvision's recipes normalise by."""
Scale = tuple[tuple[float, ...], tuple[float, ...]]
IMAGES, BATCH = 64, 16
"""Validation images that normalisations are compared on (ours), enough to see a wrong one, and those sent at once."""


def split(source: str) -> tuple[str, str | None]:
    """Split what follows ``?normalise=`` from a name; None where it has no such end."""
    bare, asked, normalise = source.rpartition("?normalise=")
    return (bare, normalise) if asked else (source, None)


def read(normalise: str, source: str, dataset: Dataset) -> Scale:
    """Return mean and standard deviation per channel, as ``?normalise=`` says them.

    Raises:
        UserError: it says something else, or of another number of channels.
    """
    count = dataset.in_channels
    if normalise == "data":
        mean, std = dataset.train.mean_std()
        return mean, tuple(value if value > 0 else 1.0 for value in std)
    if normalise == "none":
        return (0.0,) * count, (1.0,) * count
    try:
        sides = IMAGENET if normalise == "imagenet" else [tuple(map(float, s.split("/"))) for s in normalise.split(",")]
        mean, std = (side * count if len(side) == 1 else side for side in sides)
        if not (len(mean) == len(std) == count and min(std) > 0 and all(map(math.isfinite, mean + std))):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{source}?normalise={normalise}: expected imagenet (3 channels), data, none, or MEAN,STD for {count} "
            "channels, such as 0.5,0.5 or 0.485/0.456/0.406,0.229/0.224/0.225"
        ) from None
    return mean, std


def compare(model: PixelModel, dataset: Dataset, file: str, *, guessed: bool) -> None:
    """Hold how a model normalises pixels against the usual other ways, by the accuracy on validation images.

    The model and torch's global generators stay as they are.

    Args:
        model: what was loaded from ``file``.
        dataset: compared are up to :data:`IMAGES` validation images.
        file: of the weights or the graph, for the message.
        guessed: whether neither file nor name says how its pixels were normalised, which is then told as a warning; of
            what is said to take pixels as they are only a refusal is told.

    Raises:
        UserError: another way gives a clearly higher accuracy: the two 95 % intervals do not meet.
    """
    own: Scale = (model.card.mean, model.card.std)
    ways = {name: read(name, file, dataset) for name in _usual(dataset.in_channels)}
    used = next((name for name, scale in ways.items() if _same(scale, own)), _spelt(own))
    some = dataset.validation.sample(min(IMAGES, len(dataset.validation)))
    found = {used: _accuracy(model, some, own)}
    beyond = Rate.of(found[used].n, found[used].n).low  # of a flawless model
    if not guessed and some.task.per_image_label and found[used].high >= beyond:
        return  # no other way can be clearly better
    found |= {name: _accuracy(model, some, scale) for name, scale in ways.items() if name != used}
    rates = ", ".join(f"{name} {100 * rate.value:.0f} %" for name, rate in found.items())
    said = "does not say how its pixels were normalised" if guessed else f"is taken with ?normalise={used}"
    told = f"{file} {said}; right of {found[used].n} validation images with {rates}"
    best, chance = max(found, key=lambda name: found[name].value), 1 / dataset.num_classes
    if some.task.per_image_label and found[used].high < chance and found[best].low <= chance:
        told += " (fewer than by chance: is the order of the classes that of its training?)"
    if found[best].low > found[used].high:
        raise UserError(
            f"{told}: end its name in ?normalise={best}, or in ?normalise={used} if that is right after all"
        )
    if guessed:
        mean, std = ("/".join(f"{value:.3g}" for value in side) for side in own)
        alike = [name for name, rate in found.items() if name != used and rate.high >= found[used].low]
        tie = f", though these images do not tell it from {' or '.join(alike)}" if alike else ""
        warnings.warn(
            f"{told}. {used} is used (mean {mean}, std {std}){tie}: if it was trained otherwise, end its name in "
            "?normalise=imagenet, data, none, or MEAN,STD",
            stacklevel=4,
        )


def _usual(channels: int) -> list[str]:
    return [name for name in ("imagenet", "data", "none", "0.5,0.5") if name != "imagenet" or channels == 3]


def _same(one: Scale, other: Scale) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(sum(one, ()), sum(other, ()), strict=True))


def _spelt(scale: Scale) -> str:
    return ",".join("/".join(f"{value:.6g}" for value in side) for side in scale)


@torch.no_grad()
def _accuracy(model: PixelModel, split: Split, scale: Scale) -> Rate:
    modes = [(module, module.training) for module in model.modules()]
    normalize = Normalize(*scale).to(model.normalize.mean)
    try:
        model.eval()
        with seeded(0, "normalisation"):
            parts = torch.arange(len(split)).split(BATCH)
            found = [answers(model.body(normalize(x))) for x, _ in split.walk(parts, normalize.mean.device)]
    finally:
        for module, mode in modes:
            module.training = mode
    return split.counts(torch.cat(found)).accuracy
