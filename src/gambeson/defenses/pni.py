"""Parametric Noise Injection (He, Rakin, Fan, CVPR 2019): the baseline that Learn2Perturb is measured against."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.noisy import Label, NoisyDefense, starting
from gambeson.defenses.objective import Objective, Scene
from gambeson.defenses.registry import register
from gambeson.models.noisy_weights import ParametricNoise, Where


@register("pni", source="He et al. 2019", cost="s + 2 / s + 2")
class PNI(NoisyDefense):
    """Minimise 0.5 CE(clean) + 0.5 CE(PGD-7) over the weights and one size of noise a layer, the noise always on.

    Published with eps 0.031, steps of 0.01, the adversarial part from epoch 5 of 160, SGD with Nesterov momentum at
    0.1 (x0.1 at 80 and 120), weight decay 3e-4 on the weights and none on alpha.
    """

    where: Where = "weight"
    """What gets the noise; see :class:`gambeson.models.ParametricNoise`."""
    init: Annotated[Number, Field(ge=0)] = ParametricNoise().init
    """Alpha at the start."""
    step: Annotated[Number, Field(gt=0)] = 0.01 / 0.031
    """Length of a step as a share of eps: 0.01 at 0.031."""
    label: Label = "truth"
    """What the attack leaves (ours: what the paper says of it is not known)."""

    def noise(self) -> ParametricNoise:
        """Return the noise that the model shall carry."""
        return ParametricNoise(init=self.init, where=self.where)

    def adversarial_start(self, epochs: int) -> int:
        """Return the epoch from which the adversarial loss counts in a training of so many epochs."""
        return starting(self.adversarial_from, (5, 160), epochs, "adversarial_from") if self.mix else epochs

    def open(self, scene: Scene) -> Objective:
        """Return the objective.

        Raises:
            UserError: the training is too short for the adversarial loss to begin.
        """
        self.adversarial_start(scene.epochs)
        return super().open(scene)
