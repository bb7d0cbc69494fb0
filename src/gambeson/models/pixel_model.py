"""The model every room works with: pixels in, logits out."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.models.card import ModelCard
from gambeson.models.members import Members


class Normalize(nn.Module):
    """Map pixels (N, C, H, W) in [0, 1] to ``(pixels - mean) / std``, channel by channel.

    Args:
        mean: one value a channel, in pixel space.
        std: one positive value a channel.

    Raises:
        UserError: from ``forward``, for anything but a float batch with these channels; broadcasting would
            otherwise turn a grey image into a coloured one without a word.
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
        body: the architecture, which sees normalised images. A body with a true ``fixed_size`` takes images
            of the card's size only.

    Raises:
        UserError: from ``forward``, for integer images and for channels or sizes that do not fit.
    """

    def __init__(self, card: ModelCard, body: nn.Module) -> None:
        super().__init__()
        self.card = card
        self.normalize = Normalize(card.mean, card.std)
        self.body = body

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes) of ``pixels`` (N, C, H, W), which are left as they are."""
        normalised = self.normalize(pixels)
        if getattr(self.body, "fixed_size", False) and tuple(pixels.shape[-2:]) != self.card.image_size:
            raise UserError(
                f"images are {_by(*pixels.shape[-2:])}, but this {self.card.name} was created for "
                f"{_by(*self.card.image_size)}: resize the images or create the model with another image_size"
            )
        return self.body(normalised)

    @property
    def voters(self) -> list[PixelModel]:
        """The members as models of their own, which share their weights with this one; itself where it is alone."""
        if not isinstance(self.body, Members):
            return [self]
        card = self.card.model_copy(update={"members": 1})
        return [_sharing(card, self.normalize, body) for body in self.body.members]

    def extra_repr(self) -> str:
        """Show the card where the model is printed."""
        return str(self.card)


def _sharing(card: ModelCard, normalize: Normalize, body: nn.Module) -> PixelModel:
    voter = PixelModel(card, body)
    voter.normalize = normalize
    return voter.train(body.training)


def _by(height: int, width: int) -> str:
    return f"{height}x{width}"
