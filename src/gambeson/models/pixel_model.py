"""Models of pixels, with the normalisation inside, and the card from which they can be rebuilt."""

from __future__ import annotations

from typing import Annotated

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
    """Number of logits, per image or per pixel."""

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
    """Images (N, C, H, W) in [0, 1] in, logits (N, classes) out, or (N, classes, H, W) of a segmentation model.

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
        """Return the logits (N, classes) or (N, classes, H, W) of ``pixels`` (N, C, H, W), which are not modified."""
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
