"""What the defences that train a noisy model share: when each part begins, and the half-and-half adversarial loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import cross_entropy, image_means
from gambeson.base import Number, UserError
from gambeson.defenses.objective import Defense, Objective, Scene, Weight
from gambeson.defenses.terms import Adversarial, Batch, Term, batch_loss
from gambeson.models import PixelModel, injections
from gambeson.models.equip import equip
from gambeson.models.noise import Noise
from gambeson.threat import Eps, Norm, perturb

Label = Literal["prediction", "truth"]
"""What an attack inside training moves away from: the model's own answer to the clean image, or the true label."""


class NoisyClean:
    """Cross-entropy on the images as they are; it remembers what the model answered, for the attack on the batch."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._answers = torch.empty(0)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        logits = model(batch.images)
        self._batch, self._answers = batch, logits.detach().argmax(1)
        losses = cross_entropy(logits, batch.labels, batch.ignore_index)
        return image_means(losses, batch.labels, batch.ignore_index).mean()

    def answers(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the model's predictions on the batch: the remembered ones, or those of a forward of its own."""
        if self._batch is not batch:
            with torch.no_grad():
                return model(batch.images).argmax(1)
        return self._answers


class NoisyAdversarial:
    """Cross-entropy, with the true labels, on images perturbed while the noise is on.

    A batch is attacked once: a second phase on it sees the same perturbed images.
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
        answers = self.clean.answers(model, batch)
        return (
            answers if batch.ignore_index is None else answers.where(batch.labels != batch.ignore_index, batch.labels)
        )


class NoisyDefense(Defense):
    """Base of the defences that give a model noise and train it on clean and perturbed images."""

    eps: Eps
    """Radius of the attack in pixel units; 8/255 in the released codes, on CIFAR."""
    norm: Norm = "inf"
    steps: Annotated[int, Field(ge=1)] = 7
    """Gradient steps of the attack, from a uniform start."""
    step: Annotated[Number, Field(gt=0)] = 0.31875
    """Length of a step as a share of eps: 0.01 at 8/255."""
    mix: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Weight of the adversarial loss once it has begun; the clean loss has the rest. 0: no adversarial training."""
    adversarial_from: Annotated[int, Field(ge=0)] | None = None
    """Epoch from which the adversarial loss counts. None: the released code's share of the training."""
    label: Label = "prediction"
    """What the attack leaves."""

    def noise(self) -> Noise:
        """Return the noise that the model shall carry."""
        raise NotImplementedError

    def adversarial_start(self, epochs: int) -> int:
        """Return the epoch from which the adversarial loss counts in a training of so many epochs."""
        raise NotImplementedError

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The clean and the adversarial loss, weighted by the epoch."""
        attack = Adversarial(eps=self.eps, norm=self.norm, steps=self.steps, step=self.step)
        clean = NoisyClean()

        def weight(batch: Batch) -> float:
            return self.mix if batch.epoch >= self.adversarial_start(batch.epochs) else 0.0

        return {
            "clean": (lambda batch: 1 - weight(batch), clean),
            "adversarial": (weight, NoisyAdversarial(attack, clean, self.label)),
        }

    def prepare(self, model: nn.Module) -> None:
        """Put the noise into a model of ours; any other gets it in :meth:`open`, where an image's size is known."""
        if isinstance(model, PixelModel):
            equip(model, self.noise())

    def open(self, scene: Scene) -> Objective:
        """Return the objective; the model carries the noise from here on."""
        equip_for(scene, self.noise())
        return super().open(scene)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Take the noise's sizes out of the weight decay, which would make the noise vanish."""
        return undecayed(model)


def equip_for(scene: Scene, noise: Noise) -> None:
    """Put noise into the model of a training, whatever module it is."""
    images, _ = scene.train.take(slice(0, 1))
    equip(scene.model, noise, images)


def undecayed(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained sizes of a model's noise as a group without weight decay."""
    sizes = [size for module in injections(model) for size in module.learnt]
    return [{"params": sizes, "weight_decay": 0.0}] if sizes else []


def starting(given: int | None, share: tuple[int, int], epochs: int, what: str) -> int:
    """Return the epoch in which something begins: the given one, or a share of the training, rounded down.

    Raises:
        UserError: the training is over before.
    """
    first = epochs * share[0] // share[1] if given is None else given
    if first >= epochs:
        raise UserError(f"{what} = {first} lies beyond the {epochs} epochs of this training: lower it or train longer")
    return first
