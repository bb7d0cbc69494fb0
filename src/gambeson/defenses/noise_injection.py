"""Defences by noise injection: PNI and RSE, and the common base of noisy defences."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Number, UserError
from gambeson.defenses.objective import (
    Adversarial,
    Batch,
    Clean,
    Defense,
    Objective,
    Term,
    TrainContext,
    Weight,
    batch_loss,
)
from gambeson.defenses.registry import register
from gambeson.models import PixelModel, injections
from gambeson.models.factory import add_noise
from gambeson.models.noise import Noise
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise, Where
from gambeson.threat import Eps, Norm, perturb

Label = Literal["prediction", "truth"]
"""Label that an attack inside training leaves: the model's prediction on the clean image, or the true one."""


class NoisyClean:
    """Cross-entropy on clean images; it stores the model's predictions for the attack on the batch."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._predictions = torch.empty(0)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        logits = model(batch.images)
        self._batch, self._predictions = batch, logits.detach().argmax(1)
        return batch.losses(logits).mean()

    def predictions(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the model's predictions on the batch: the stored ones, or those of a new forward."""
        if self._batch is not batch:
            with torch.no_grad():
                return model(batch.images).argmax(1)
        return self._predictions


class NoisyAdversarial:
    """Cross-entropy, with the true labels, on images perturbed with the noise on.

    A batch is attacked once: a second phase uses the same perturbed images.
    """

    def __init__(self, attack: Adversarial, clean: NoisyClean, label: Label) -> None:
        self.attack, self.clean, self.label = attack, clean, label
        self._batch: Batch | None = None
        self._delta = torch.empty(0)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        if self._batch is not batch:
            targets = self._leave(model, batch) if self.label == "prediction" else batch.labels
            self._delta = self.attack.craft(model, replace(batch, labels=targets))
            self._batch = batch
        return batch_loss(model, perturb(batch.images, self._delta), batch)

    def _leave(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return batch.task.targets(self.clean.predictions(model, batch), batch.labels)


class NoisyDefense(Defense):
    """Base of the defences that add noise to a model and train it on clean and perturbed images."""

    eps: Eps
    """Radius of the attack in pixel units; 8/255 in the released codes, on CIFAR."""
    norm: Norm = "inf"
    steps: Annotated[int, Field(ge=1)] = 7
    """Gradient steps of the attack, from a uniform start."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.31875
    """Step size as a share of eps: 0.01 at 8/255."""
    mix: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Weight of the adversarial loss once it has started; the clean loss has the rest. 0: no adversarial training."""
    adversarial_from: Annotated[int, Field(ge=0)] | None = None
    """Epoch from which the adversarial loss counts. None: the released code's share of the training."""
    label: Label = "prediction"
    """Label that the attack leaves."""

    def noise(self) -> Noise:
        """Return the noise that the model shall carry."""
        raise NotImplementedError

    def adversarial_start(self, epochs: int) -> int:
        """Return the epoch from which the adversarial loss counts in a training of so many epochs."""
        raise NotImplementedError

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The clean and the adversarial loss, weighted by the epoch."""
        attack = Adversarial(eps=self.eps, norm=self.norm, steps=self.steps, rel_step_size=self.rel_step_size)
        clean = NoisyClean()

        def weight(batch: Batch) -> float:
            return self.mix if batch.epoch >= self.adversarial_start(batch.epochs) else 0.0

        return {
            "clean": (lambda batch: 1 - weight(batch), clean),
            "adversarial": (weight, NoisyAdversarial(attack, clean, self.label)),
        }

    def configure_model(self, model: nn.Module) -> None:
        """Add the noise to a :class:`PixelModel`; others get it in :meth:`build_objective`."""
        if isinstance(model, PixelModel):
            add_noise(model, self.noise())

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective; from here on the model has the noise."""
        add_noise_for(context, self.noise())
        return super().build_objective(context)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Exclude the noise parameters from weight decay, which would make the noise vanish."""
        return undecayed(model)


def add_noise_for(context: TrainContext, noise: Noise) -> None:
    """Add noise to the model of a training, which can be any module."""
    images, _ = context.train.take(slice(0, 1))
    add_noise(context.model, noise, images)


def undecayed(model: nn.Module) -> list[dict[str, Any]]:
    """Return the noise parameters of a model as a group without weight decay."""
    sizes = [size for module in injections(model) for size in module.learnt]
    return [{"params": sizes, "weight_decay": 0.0}] if sizes else []


def starting(given: int | None, share: tuple[int, int], epochs: int, what: str) -> int:
    """Return the epoch in which a part starts: the given one, or a share of the training, rounded down.

    Raises:
        UserError: the training ends before.
    """
    first = epochs * share[0] // share[1] if given is None else given
    if first >= epochs:
        raise UserError(f"{what} = {first} lies beyond the {epochs} epochs of this training: lower it or train longer")
    return first


@register("pni", source="He et al. 2019", cost="k + 2 / k + 2")
class PNI(NoisyDefense):
    """Minimise 0.5 CE(clean) + 0.5 CE(PGD-7) over the weights and one noise scale per layer, with the noise always on.

    Published with eps 0.031, steps of 0.01, the adversarial part from epoch 5 of 160, SGD with Nesterov momentum at
    0.1 (x0.1 at 80 and 120), weight decay 3e-4 on the weights and none on alpha.
    """

    where: Where = "weight"
    """Position of the noise; see :class:`gambeson.models.ParametricNoise`."""
    init: Annotated[Number, Field(ge=0)] = ParametricNoise().init
    """Initial alpha."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.01 / 0.031
    """Step size as a share of eps: 0.01 at 0.031."""
    label: Label = "truth"
    """Label that the attack leaves (ours: the paper's is not known to us)."""

    def noise(self) -> ParametricNoise:
        """Return the noise that the model shall carry."""
        return ParametricNoise(init=self.init, where=self.where)

    def adversarial_start(self, epochs: int) -> int:
        """Return the epoch from which the adversarial loss counts in a training of so many epochs."""
        return starting(self.adversarial_from, (5, 160), epochs, "adversarial_from") if self.mix else epochs

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective.

        Raises:
            UserError: the training is too short for the adversarial loss to start.
        """
        self.adversarial_start(context.epochs)
        return super().build_objective(context)


@register("rse", source="Liu et al. 2018", cost="1 / 1")
class RSE(Defense):
    """Minimise E[CE] under noise of fixed scale.

    Predictions are the mean softmax over several passes: :class:`gambeson.models.PassAverage` of the result.
    """

    first: Annotated[Number, Field(ge=0)] = FixedNoise().first
    """Standard deviation on the normalised images."""
    rest: Annotated[Number, Field(ge=0)] = FixedNoise().rest
    """Standard deviation before every other convolution."""

    def noise(self) -> FixedNoise:
        """Return the noise that the model shall carry."""
        return FixedNoise(first=self.first, rest=self.rest)

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The clean term."""
        return {"clean": (1.0, Clean())}

    def configure_model(self, model: nn.Module) -> None:
        """Add the noise to a :class:`PixelModel`; others get it in :meth:`build_objective`."""
        if isinstance(model, PixelModel):
            add_noise(model, self.noise())

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective; from here on the model has the noise."""
        add_noise_for(context, self.noise())
        return super().build_objective(context)
