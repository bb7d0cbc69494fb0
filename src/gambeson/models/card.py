"""The card: everything that is needed to build a model again, apart from its weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gambeson.base import Config, Number
from gambeson.models.members import Average
from gambeson.models.noise import FeatureNoise
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise

Size = Annotated[int, Field(ge=1)]

AnyNoise = Annotated[FeatureNoise | ParametricNoise | FixedNoise, Field(discriminator="kind")]
"""Learn2Perturb's noise or one of its baselines', told apart by ``kind``."""


class ModelCard(Config):
    """What a model is, stored beside its weights so that a file can be loaded on its own.

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
    """How they vote, where there are several."""

    noise: AnyNoise | None = None
    """The noise that every body carries."""

    @model_validator(mode="after")
    def _channels_agree(self) -> ModelCard:
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{field} has {len(values)} values for {self.in_channels} channels: give one a channel"
                )
        return self
