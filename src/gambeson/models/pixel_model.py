"""Classifiers of pixels, with the normalisation inside, and the card from which they can be rebuilt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any
from weakref import WeakSet

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import Config, Number, UserError
from gambeson.models.members import Average, Members
from gambeson.models.noise import FeatureNoise
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise

Size = Annotated[int, Field(ge=1)]

AnyNoise = Annotated[FeatureNoise | ParametricNoise | FixedNoise, Field(discriminator="kind")]
"""The noise of Learn2Perturb or of a baseline, distinguished by ``kind``."""


class ModelCard(Config):
    """Everything needed to rebuild a model except its weights; stored in the same file.

    Raises:
        TypeError: a field is missing or unknown.
        UserError: a size is not positive, or the normalisation does not match the channels.
    """

    name: str
    """Name of the architecture, as :func:`gambeson.models.create` takes it."""

    in_channels: Size
    """Channels of an image, C."""

    classes: Annotated[int, Field(ge=2)]
    """Number of logits."""

    image_size: tuple[Size, Size]
    """Height and width of an image in pixels, (H, W)."""

    mean: tuple[Number, ...]
    """Mean subtracted from each channel, in pixel space [0, 1]."""

    std: tuple[Annotated[Number, Field(gt=0)], ...]
    """Standard deviation each channel is divided by, in pixel space."""

    members: Size = 1
    """Bodies that vote."""

    average: Average = "probabilities"
    """How they vote, if there are several."""

    noise: AnyNoise | None = None
    """The noise of every body."""

    @model_validator(mode="after")
    def _channels_agree(self) -> ModelCard:
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{field} has {len(values)} values for {self.in_channels} channels: give one per channel"
                )
        return self


class Normalize(nn.Module):
    """Map pixels (N, C, H, W) in [0, 1] to ``(pixels - mean) / std``, channel by channel.

    Args:
        mean: one value per channel, in pixel space.
        std: one positive value per channel.

    Raises:
        UserError: from ``forward``, for anything but a float batch with these channels; broadcasting would otherwise
            silently turn a grey image into a colour one.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised images as a new tensor (N, C, H, W)."""
        channels = self.mean.shape[1]
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise UserError(
                f"images have shape {tuple(pixels.shape)}: this model expects (N, {channels}, H, W); "
                "convert the images or create the model with other in_channels"
            )
        if not pixels.is_floating_point():
            raise UserError(f"images are {pixels.dtype}: expected floats in [0, 1]; pass images.float() / 255")
        return (pixels - self.mean) / self.std


class PixelModel(nn.Module):
    """A classifier of pixels: images (N, C, H, W) in [0, 1] in, logits (N, classes) out.

    Attributes:
        card: what the model is.
        normalize: the normalisation, with buffers ``mean`` and ``std`` of shape (1, C, 1, 1).
        body: the architecture, which receives normalised images. A body with a true ``fixed_size`` accepts images of
            the card's size only.

    Raises:
        UserError: from ``forward``, for integer images and for channels or sizes that do not fit.
    """

    def __init__(self, card: ModelCard, body: nn.Module) -> None:
        super().__init__()
        self.card = card
        self.normalize = Normalize(card.mean, card.std)
        self.body = body

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes) of ``pixels`` (N, C, H, W), which are not modified."""
        normalised = self.normalize(pixels)
        if getattr(self.body, "fixed_size", False) and tuple(pixels.shape[-2:]) != self.card.image_size:
            raise UserError(
                f"images are {_by(*pixels.shape[-2:])}, but this {self.card.name} was created for "
                f"{_by(*self.card.image_size)}: resize the images or create the model with another image_size"
            )
        return self.body(normalised)

    @property
    def voters(self) -> list[PixelModel]:
        """The members as separate models that share weights with this one; itself if it is not an ensemble."""
        if not isinstance(self.body, Members):
            return [self]
        card = self.card.model_copy(update={"members": 1})
        return [_sharing(card, self.normalize, body) for body in self.body.members]

    def extra_repr(self) -> str:
        """Show the card when the model is printed."""
        return str(self.card)


def _sharing(card: ModelCard, normalize: Normalize, body: nn.Module) -> PixelModel:
    voter = PixelModel(card, body)
    voter.normalize = normalize
    return voter.train(body.training)


def _by(height: int, width: int) -> str:
    return f"{height}x{width}"


PROBABILITIES, SIGMOID, ONE_LOGIT = "probabilities", "sigmoid", "one-logit"
_TINY = 1e-30


_checked: WeakSet[nn.Module] = WeakSet()


class as_logits(nn.Module):  # noqa: N801  (used like a function)
    """Wrap a model so that it returns logits.

    Args:
        model: any module.
        output: what the model returns: ``probabilities`` of the classes, whose logarithm is then returned; ``sigmoid``,
            a probability of its own for each class, whose inverse is returned; ``one-logit``, the logit of the second
            of two classes, (N,), (N, 1), (N, H, W) or (N, 1, H, W), beside which the first gets 0, so that its sigmoid
            is their softmax (a sigmoid of one class is read likewise); or the key of the logits in a mapping. What a
            softmax or a sigmoid has rounded to 0 or 1 has no gradient any more: leave the last layer out where you can.
            Of an object the key is an attribute, of a tuple a number, as in ``"0"``.

    Raises:
        UserError: from ``forward``, for any other output.
    """

    def __init__(self, model: nn.Module, output: str = PROBABILITIES) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of images (N, C, H, W)."""
        answer: Any = self.model(images)
        if self.output in (PROBABILITIES, SIGMOID, ONE_LOGIT):
            if isinstance(answer, torch.Tensor):
                return self._logits(answer, images)
        elif not isinstance(answer, torch.Tensor):
            inside = dict(enumerate(answer)) if isinstance(answer, tuple | list) else answer
            key = int(self.output) if self.output.isdecimal() and inside is not answer else self.output
            found = inside.get(key) if isinstance(inside, Mapping) else getattr(answer, self.output, None)
            if isinstance(found, torch.Tensor):
                return found
        keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise UserError(
            f"the model returned {type(answer).__name__}{keys}, from which {self.output!r} cannot be read: name "
            "`probabilities`, `sigmoid` or `one-logit` for a tensor of them, or the key of the logits"
        )

    def _check(self, answer: torch.Tensor) -> None:
        """Check, at the first call, that the values can be what they are said to be."""
        low, high = (float(bound) for bound in torch.aminmax(answer.detach()))
        inside = low >= 0 and high <= 1
        if self.output != ONE_LOGIT and not inside:
            raise UserError(
                f"the model's outputs reach from {low:.3g} to {high:.3g}: expected {self.output} in [0, 1]; leave "
                "as_logits out for logits, or name `one-logit` for a single one"
            )
        if self.output == ONE_LOGIT and inside and low < high and len(answer) >= 8:
            warnings.warn(
                "all outputs of the model lie in [0, 1]: if they are probabilities, name `sigmoid`, not `one-logit`",
                stacklevel=4,
            )
        _checked.add(self)

    def _logits(self, answer: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if self not in _checked and answer.numel() and bool(answer.isfinite().all()):
            self._check(answer)
        if self.output == PROBABILITIES:
            return answer.clamp(min=_TINY).log()
        if self.output == SIGMOID:
            answer = answer.clamp(min=_TINY).log() - (1 - answer).clamp(min=_TINY).log()
        if answer.ndim == 1 or answer.shape[1:] == images.shape[2:]:
            answer = answer.unsqueeze(1)
        if answer.shape[1] == 1:
            return torch.cat([torch.zeros_like(answer), answer], 1)
        if self.output == ONE_LOGIT:
            raise UserError(f"the model returned shape {tuple(answer.shape)}: expected one logit per image or pixel")
        return answer


class fixed_batch(nn.Module):  # noqa: N801  (used like a function)
    """Wrap a model that takes a fixed number of images, or a multiple of a number, so that it takes any.

    A last, smaller part is padded with copies of the last image, whose logits are dropped.

    Args:
        model: from (N, C, H, W) to logits, one row per image, each independent of the others.
        size: the number of images it takes.
        multiple: it takes any multiple of ``size`` at once, such as an even number; otherwise exactly ``size``.
    """

    def __init__(self, model: nn.Module, size: int, *, multiple: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size = {size}: expected the number of images that the model takes")
        self.model, self.size, self.multiple = model, size, multiple

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, ...) of images (N, C, H, W)."""
        padding = images[-1:].expand(-len(images) % self.size, -1, -1, -1)
        padded = torch.cat([images, padding]) if len(padding) else images
        parts = [padded] if self.multiple else padded.split(self.size)
        answers = [self.model(part) for part in parts]
        squeezed = [answer[None] if answer.ndim in (1, 3) else answer for answer in answers]  # a part of one image
        return torch.cat(squeezed)[: len(images)]
