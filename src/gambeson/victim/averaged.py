"""The model that an attack climbs: one, or an ensemble of source models whose examples shall transfer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.victim.inspect import ModelTraits
from gambeson.victim.victim import Victim

Average = Literal["logits", "probabilities", "losses"]
"""What is averaged over several source models (Dong et al. 2018, section 3.2, compares the three)."""

Source = nn.Module | Victim | Sequence["nn.Module | Victim"]
"""A module from pixels to logits, a :class:`Victim` already entered, or several of either."""


class AveragedVictim(Victim):
    """A victim that gives several answers to each image, which are averaged; see :data:`Average`."""

    average: Average

    def each(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each answer, logits (N, K) or (N, K, H, W)."""
        raise NotImplementedError

    def combine(self, each: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of the average: the mean, or the logarithm of the mean probability."""
        stacked = torch.stack(list(each))
        if self.average == "logits":
            return stacked.mean(0)
        return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the average, (N, K) or (N, K, H, W)."""
        return self.combine(self.each(images))


class ModelAverage(AveragedVictim):
    """Several models attacked as one: every image sent in is sent to each, and counted for each.

    Args:
        models: modules, or victims whose own settings and counts then hold too.
        average: ``logits`` (MI-FGSM's, whose logits of the ensemble are the mean), ``probabilities`` (the logits of
            the ensemble are the logarithm of the mean probability) or ``losses`` (each model has its own loss;
            predictions are those of the mean probability).

    Raises:
        UserError: no models, something that is no model, or models on several devices.
    """

    def __init__(self, models: Sequence[nn.Module | Victim], average: Average = "logits") -> None:
        if not isinstance(models, list | tuple):
            raise UserError(f"a model is a {type(models).__name__}: expected a torch.nn.Module, or a list of them")
        if not models:
            raise UserError("the list of models is empty: give one model or more")
        for model in models:
            if not isinstance(model, nn.Module | Victim):
                raise UserError(f"a model is a {type(model).__name__}: expected a torch.nn.Module")
        self.members = [model if isinstance(model, Victim) else Victim(model, fast=True) for model in models]
        places = sorted({str(member.device) for member in self.members})
        if len(places) > 1:
            raise UserError(f"the models are on {' and '.join(places)}: move them to one device")
        super().__init__(nn.ModuleList(member.model for member in self.members))
        self.average = average

    def each(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each model.

        Raises:
            UserError: the models do not answer in one shape.
        """
        self.forwards += len(images) * len(self.members)
        found = [member(images) for member in self.members]
        shapes = {tuple(logits.shape[1:]) for logits in found}
        if len(shapes) > 1:
            raise UserError(
                f"the models answer with shapes {' and '.join(map(str, sorted(shapes)))} an image: "
                "choose models of the same classes"
            )
        return found

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the ensemble's logits by the models themselves."""
        self.forwards += len(images) * len(self.members)
        return self.combine([member.forward_original(images) for member in self.members])

    def gradient(self, value: torch.Tensor, wrt: torch.Tensor, images: int) -> torch.Tensor:
        """Return the gradient of a scalar, counted as ``images`` backward passes of every model."""
        for member in self.members:
            member.backwards += images
        return super().gradient(value, wrt, images * len(self.members))

    def inspect(self, images: torch.Tensor, *, scores: bool = False) -> ModelTraits:
        """Look at every model; what is true of one is said of all."""
        looks = [member.inspect(images, scores=scores) for member in self.members]
        self.traits = ModelTraits(
            gap=max(look.gap for look in looks),
            shared=any(look.shared for look in looks),
            writes=any(look.writes for look in looks),
            probabilities=any(look.probabilities for look in looks),
        )
        return self.traits


class EOTAverage(AveragedVictim):
    """A random model attacked through several fresh draws: expectation over transformation (Athalye et al. 2018).

    The gradient is that of the mean loss of the draws; their mean probability is what an image has to fool. Each
    draw is independent for every image. All are made in one forward where the model draws for each image by itself
    and memory allows, and in one forward each where it draws once for a batch.

    Args:
        victim: inside its context, and met.
        eot_samples: how many.
    """

    average: Average = "losses"

    def __init__(self, victim: Victim, eot_samples: int) -> None:
        super().__init__(victim.model)
        self.victim, self.eot_samples = victim, eot_samples
        self.traits = victim.traits

    def each(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the logits of each draw."""
        if self.traits is not None and self.traits.shared:
            return [self.victim(images) for _ in range(self.eot_samples)]
        at_once = max(1, _VALUES_A_FORWARD // max(1, images.numel()))
        found: list[torch.Tensor] = []
        while len(found) < self.eot_samples:
            copies = min(at_once, self.eot_samples - len(found))
            found += self.victim(images.repeat(copies, 1, 1, 1)).chunk(copies)
        return found

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's own logits: one draw."""
        return self.victim.forward_original(images)

    def gradient(self, value: torch.Tensor, wrt: torch.Tensor, images: int) -> torch.Tensor:
        """Return the gradient of a scalar, counted as ``images`` backward passes for every draw."""
        return self.victim.gradient(value, wrt, images * self.eot_samples)


EOT_SAMPLES = 10
"""Draws of a random model that a gradient is averaged over where nothing else is said (ours; the papers: 1 to 30)."""

_VALUES_A_FORWARD = 2**23
"""Input values of all draws that are sent forward at once: 128 colour images of 32 x 32 drawn 21 times."""


@contextmanager
def opened(source: Source, average: Average = "logits") -> Iterator[Victim]:
    """Hold one model, or an ensemble of several, frozen and counted; a victim given as one is used as it is.

    Raises:
        UserError: an empty list, something that is no model, or models on several devices.
    """
    if isinstance(source, Victim):
        yield source
        return
    with Victim(source, fast=True) if isinstance(source, nn.Module) else ModelAverage(source, average) as victim:
        yield victim


@contextmanager
def entered(source: Source) -> Iterator[list[Victim]]:
    """Do as :func:`opened`, and return the victim of each model."""
    with opened(source) as victim:
        yield victim.members if isinstance(victim, ModelAverage) and victim is not source else [victim]


def drawn(victim: Victim, images: torch.Tensor, eot_samples: int | None) -> Victim:
    """Meet a model and return what an attack on these images shall climb: itself, or its draws.

    Raises:
        UserError: the model is random and no number of draws was given.
    """
    look = victim.inspect(images)
    if eot_samples is not None:
        return EOTAverage(victim, eot_samples) if eot_samples > 1 else victim
    if look.stochastic:
        raise UserError(
            f"the model is random (the logits of two calls with the same images differ by up to {look.gap:.3g}): one "
            "draw tells an attack little; set eot_samples=20 to average its gradient over 20 draws, or turn the "
            "randomness off"
        )
    return victim
