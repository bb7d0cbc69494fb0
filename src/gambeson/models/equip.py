"""Put noise into a finished model, in place, so that its card says so."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.models.members import Members
from gambeson.models.noise import Noise, add_noise, injections
from gambeson.models.pixel_model import PixelModel


def equip(model: nn.Module, noise: Noise, example: torch.Tensor | None = None) -> None:
    """Put noise into every body of a model, in place and once; a model of ours says so in its card from then on.

    Args:
        model: any module; a model of :func:`gambeson.models.create` needs nothing else.
        noise: which.
        example: (1, C, H, W), needed for any other module, to see the features' shapes.

    Raises:
        UserError: no place for the noise, another noise is there, or an example is missing.
    """
    if isinstance(model, PixelModel):
        card = model.card
        for body in model.body.members if isinstance(model.body, Members) else [model.body]:
            add_noise(body, noise, torch.zeros(1, card.in_channels, *card.image_size))
        model.body.fixed_size = True  # type: ignore[assignment]
        model.card = card.model_copy(update={"noise": noise})
        return
    if example is None and not injections(model):
        raise UserError(f"noise for a {type(model).__name__} needs an example image (1, C, H, W): pass one")
    add_noise(model, noise, torch.zeros(1) if example is None else example)
