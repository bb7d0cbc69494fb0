"""How the pixels of a model that someone else trained are normalised: what a name asks for, and what the data say."""

from __future__ import annotations

import math
import warnings

import torch

from gambeson.base import UserError
from gambeson.data import Dataset
from gambeson.models.pixel_model import Normalize, PixelModel
from gambeson.tasks import Rate
from gambeson.tasks.task import answers

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that torchvision's recipes normalise by."""
Scale = tuple[tuple[float, ...], tuple[float, ...]]
IMAGES = 64
"""Validation images that normalisations are compared on (ours): enough to see a wrong one."""


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


def tell(model: PixelModel, dataset: Dataset, file: str, used: str) -> None:
    """Warn that weights do not say how their pixels were normalised, with the clean accuracy under each usual way.

    Args:
        model: the model with these weights, which normalises in the way ``used``.
        dataset: compared are up to :data:`IMAGES` validation images.
        file: of the weights, for the message.
        used: ``imagenet`` or ``data``.

    Raises:
        UserError: another way gives a clearly higher accuracy: the two 95 % intervals do not meet.
    """
    names = [used, *(name for name in ("imagenet", "data", "none", "0.5,0.5") if name != used)]
    if dataset.in_channels != len(IMAGENET[0]):
        names.remove("imagenet")
    split = dataset.validation.sample(min(IMAGES, len(dataset.validation)))
    images, labels = split.take(slice(0, len(split)))

    def accuracy(scale: Scale) -> Rate:
        return split.task.counts(answers(model.eval().body(Normalize(*scale)(images))), labels).accuracy

    with torch.no_grad():
        rates = {name: accuracy(read(name, file, dataset)) for name in names}
    found = ", ".join(f"{name} {100 * rate.value:.0f} %" for name, rate in rates.items())
    told = f"{file} does not say how its pixels were normalised; right of {rates[used].n} validation images: {found}"
    best = max(rates, key=lambda name: rates[name].value)
    if rates[best].low > rates[used].high:
        raise UserError(
            f"{told}: end the model's name in ?normalise={best}, or in ?normalise={used} if that is right after all"
        )
    mean, std = ("/".join(f"{value:.3g}" for value in side) for side in (model.card.mean, model.card.std))
    warnings.warn(
        f"{told}: {used} is used (mean {mean}, std {std}); if it was trained otherwise, end the model's name in "
        "?normalise=imagenet, data, none, or MEAN,STD",
        stacklevel=4,
    )
