"""Construction of models by name, ensembles of models, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from gambeson.base import UserError, seeded
from gambeson.models import external, torchvision_nets
from gambeson.models.members import Average, Members
from gambeson.models.noise import Noise, inject_noise, injections
from gambeson.models.pixel_model import ModelCard, PixelModel
from gambeson.models.registry import build_body, check_name, is_ours


class TrainSplit(Protocol):
    """The part of a split that a model needs."""

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in pixel space [0, 1]."""


class ImageData(Protocol):
    """The part of a data set that a model needs."""

    @property
    def in_channels(self) -> int:
        """Channels of an image."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def train(self) -> TrainSplit:
        """The training split."""


def create(
    name: str,
    data: ImageData | None = None,
    *,
    in_channels: int | None = None,
    classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    members: int = 1,
    average: Average = "probabilities",
    noise: Noise | None = None,
    seed: int | None = None,
) -> PixelModel:
    """Build a model from pixels (N, C, H, W) in [0, 1] to logits (N, classes), in training mode.

    Args:
        name: one of :func:`gambeson.models.names`: ``lenet`` (Jacobian regularisation), ``mnist-a`` to
            ``mnist-d`` (Ensemble Adversarial Training), ``resnet20`` to ``resnet56`` and ``resnet18``
            (Learn2Perturb), with a width factor as in ``resnet20x4`` (Shared Adversarial Training); or
            ``torchvision:NAME`` for an architecture of torchvision, ``torchvision:NAME@WEIGHTS`` for its
            weights too; ``timm:NAME``, ``timm:NAME@TAG`` or ``transformers:NAME_OR_PATH``, whose weights get a new last
            layer if the number of classes differs; or ``FILE.py:FUNCTION``, a function of your own that returns a
            module from pixels to logits.
        data: a data set, which supplies omitted keywords.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: side, or (H, W), in pixels.
        mean: what to subtract from the pixels: one number, or one per channel.
        std: what to divide them by. Without these two the mean and std of the training split are used, or 0 and 1
            without data; torchvision weights and external models bring their own, which take precedence over the
            data's.
        members: bodies that vote, each drawn independently.
        average: how they vote.
        noise: noise of every body.
        seed: of the weights, which are then those that ``gambeson train`` with this seed starts from; None draws them
            from torch's global generator.

    Raises:
        UserError: an unknown name, something missing or out of range, or images too small.

    Example:
        >>> model = create("lenet", in_channels=1, classes=10, image_size=28)
    """
    name = external.canonical(name)
    elsewhere = external.is_external(name)
    if not elsewhere:
        check_name(name)
    if data is not None and not all(
        hasattr(data, key) for key in ("in_channels", "image_size", "num_classes", "train")
    ):
        raise UserError(f"data is a {type(data).__name__}: pass a data set from data.load, or the keywords alone")
    if (mean is None) != (std is None):
        raise UserError("only one of mean and std was given: give both or neither")
    preset = external.defaults(name) if elsewhere else {}
    if name.startswith(torchvision_nets.PREFIX):
        preset = torchvision_nets.weights_defaults(name)

    def pick(key: str, given: Any, from_data: str) -> Any:
        if given is not None:
            return given
        return preset.get(key) if data is None else getattr(data, from_data)

    shape = {
        "in_channels": pick("in_channels", in_channels, "in_channels"),
        "classes": pick("classes", classes, "num_classes"),
        "image_size": pick("image_size", image_size, "image_size"),
    }
    if missing := [key for key, value in shape.items() if value is None]:
        raise UserError(f"{name} needs {' and '.join(missing)}: pass a data set, or give them as keywords")
    channels, size = shape["in_channels"], shape["image_size"]
    if mean is None or std is None:
        if "mean" in preset and (isinstance(preset["mean"], float) or len(preset["mean"]) == channels):
            mean, std = preset["mean"], preset["std"]
        elif data is None:
            mean, std = 0.0, 1.0
        else:
            mean, std = data.train.mean_std()
            std = [value if value > 0 else 1.0 for value in std]  # a constant channel is only shifted
    card = ModelCard(
        name=name,
        in_channels=channels,
        classes=shape["classes"],
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        mean=_per_channel(mean, channels),
        std=_per_channel(std, channels),
        members=members,
        average=average,
        noise=noise,
    )
    with nullcontext() if seed is None else seeded(seed, "model"):
        return build(card)


def build(card: ModelCard, *, pretrained: bool = True) -> PixelModel:
    """Build the model that a card describes, from torch's global random generator.

    Args:
        card: what the model is.
        pretrained: False does not download the weights of ``torchvision:NAME@WEIGHTS``.

    Raises:
        UserError: unknown name, images too small, or no layer for the noise.
    """
    make = external.build_body if external.is_external(card.name) else _registered
    bodies = [
        make(card.name, card.in_channels, card.classes, card.image_size, pretrained=pretrained)
        for _ in range(card.members)
    ]
    if card.noise is not None:
        for body in bodies:
            inject_noise(body, card.noise, torch.zeros(1, card.in_channels, *card.image_size))
    return PixelModel(card, bodies[0] if card.members == 1 else Members(bodies, card.average))


def _registered(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool = True
) -> nn.Module:
    body = build_body(name, in_channels, classes, image_size, pretrained=pretrained)
    if is_ours(name):
        return body
    if not isinstance(body, nn.Module):
        raise UserError(f"the model {name} is a {type(body).__name__}: expected a torch.nn.Module from its package")
    return external.tried(name, body, in_channels, classes, image_size)


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (float(value),) * channels
    return tuple(float(entry) for entry in value)


def ensemble(models: Sequence[PixelModel], average: Average = "probabilities") -> PixelModel:
    """Return an ensemble of the given models, which shares their weights.

    Member m of a run with seed s equals the single run with seed ``derive(s, "member", m)``, so members can be trained
    one after another, or on different machines, and joined here.

    Args:
        models: models of :func:`gambeson.models.create` with equal cards, one body each.
        average: how they vote.

    Raises:
        UserError: no models, ensembles among them, or different cards.
    """
    if not models:
        raise UserError("an ensemble of no models: give at least one")
    first = models[0].card
    for number, model in enumerate(models):
        if model.card.members != 1:
            raise UserError(f"model {number} is an ensemble of {model.card.members} itself: give its voters one by one")
        own, theirs = first.plain(), model.card.plain()
        if differing := [name for name in own if own[name] != theirs[name]]:
            raise UserError(
                f"model {number} differs from model 0 in {', '.join(differing)}: the members of an ensemble share "
                "architecture, classes and normalisation"
            )
    if len(models) == 1:
        return models[0]
    card = first.model_copy(update={"members": len(models), "average": average})
    joined = PixelModel(card, Members([model.body for model in models], average))
    joined.normalize = models[0].normalize
    return joined.train(models[0].training)


def add_noise(model: nn.Module, noise: Noise, example: torch.Tensor | None = None) -> None:
    """Add noise to every body of a model, in place and once; the card of a :class:`PixelModel` records it.

    Args:
        model: any module; a model of :func:`gambeson.models.create` needs nothing else.
        noise: which.
        example: (1, C, H, W), needed for any other module to determine feature shapes.

    Raises:
        UserError: no layer for the noise, another noise is present, or an example is missing.
    """
    if isinstance(model, PixelModel):
        card = model.card
        for body in model.body.members if isinstance(model.body, Members) else [model.body]:
            inject_noise(body, noise, torch.zeros(1, card.in_channels, *card.image_size))
        model.body.fixed_size = True  # type: ignore[assignment]
        model.card = card.model_copy(update={"noise": noise})
        return
    if example is None and not injections(model):
        raise UserError(f"noise for a {type(model).__name__} needs an example image (1, C, H, W): pass one")
    inject_noise(model, noise, torch.zeros(1) if example is None else example)
