"""Random Self-Ensemble (Liu, Cheng, Zhang, Hsieh, ECCV 2018): fixed noise before every convolution, no attack."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from gambeson.base import Number
from gambeson.defenses.noisy import equip_for
from gambeson.defenses.objective import Defense, Objective, Scene, Weight
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Clean, Term
from gambeson.models import PixelModel
from gambeson.models.equip import equip
from gambeson.models.noisy_weights import FixedNoise


@register("rse", source="Liu et al. 2018", cost="1 / 1")
class RSE(Defense):
    """Minimise E[CE] under noise of fixed size.

    The model predicts by the mean softmax over several passes: :class:`gambeson.models.PassAverage` of the result.
    """

    first: Annotated[Number, Field(ge=0)] = FixedNoise().first
    """Standard deviation on the normalised images."""
    rest: Annotated[Number, Field(ge=0)] = FixedNoise().rest
    """Standard deviation before every other convolution."""

    def noise(self) -> FixedNoise:
        """Return the noise that the model shall carry."""
        return FixedNoise(first=self.first, rest=self.rest)

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The clean term alone."""
        return {"clean": (1.0, Clean())}

    def prepare(self, model: nn.Module) -> None:
        """Put the noise into a model of ours; any other gets it in :meth:`open`, where an image's size is known."""
        if isinstance(model, PixelModel):
            equip(model, self.noise())

    def open(self, scene: Scene) -> Objective:
        """Return the objective; the model carries the noise from here on."""
        equip_for(scene, self.noise())
        return super().open(scene)
