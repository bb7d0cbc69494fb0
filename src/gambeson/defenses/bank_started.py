"""Bank-started steps (ours): universal consistency, and of some images one step of their own from the bank's entry."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Number, generator
from gambeson.defenses.objective import Batch, Clean, Objective, SharedForward, TrainContext
from gambeson.defenses.registry import register
from gambeson.defenses.universal_consistency import BankConsistency, UAPBank, UniversalConsistency
from gambeson.threat import Ball, perturb
from gambeson.victim import FastPath, Precision, Victim


@register("bank-started", source="ours", cost="2 + share / 2 + share")
class BankStarted(UniversalConsistency):
    """Minimise E[CE(f(x), y)] + beta * E[KL(f(x), f(x + delta))] against universal and per-image perturbations at once.

    Every image is assigned an entry of a bank of persistent perturbations, as in :class:`UniversalConsistency`. A share
    of the images then takes one step up the cross-entropy of its own, from that entry plus uniform noise, projected
    onto the ball of ``eps``; the others carry the entry itself. The entries are moved by the gradients of all their
    images, at the point where each is evaluated. One more forward and backward than universal consistency, of the
    share, trains against both threats; a bank of a larger radius moves the eps that universal perturbations need.
    """

    radius: Annotated[Number, Field(gt=0)] = 1.35
    """Radius of the bank's perturbations as a multiple of eps."""
    share: Annotated[Number, Field(ge=0, le=1)] = 0.6
    """Share of the images that take a step of their own; 0 is :class:`UniversalConsistency` with a bank of this
    radius."""
    noise: Annotated[Number, Field(ge=0)] = 1.0
    """Radius of the uniform noise before the step, as a multiple of eps."""
    row_step: Annotated[Number, Field(gt=0)] = 0.6
    """Length of the step as a multiple of eps."""
    beta: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of the consistency; 0 is standard training."""
    warmup: Annotated[Number, Field(ge=0, le=1)] = 0.3
    """Share of the training over which the weight rises linearly from zero."""
    eps_warmup: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Share of the training over which the perturbations, the noise and the steps grow linearly to their size."""
    craft_precision: Precision = "float32"
    """Precision of the model in the images' own steps, independent of the recipe's."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with its initial bank."""
        bank = UAPBank(
            context,
            count=self.bank,
            ball=Ball(eps=self.radius * self.eps, norm=self.norm),
            rel_step_size=self.rel_step_size,
            start=self.start,
            box_gradient=self.box_gradient,
        )
        term = StartedConsistency(bank, self)
        return SharedForward({"clean": (1.0, Clean()), "consistency": (term.strain, term)})


Speed = Literal["fast", "best"]
"""How long the training of a preset is: ``fast``, or ``best``, four times as long."""
_EPOCHS: dict[Speed, int] = {"fast": 10, "best": 40}


@register("gambeson", source="ours", cost="2 + share / 2 + share")
class Gambeson(BankStarted):
    """Bank-started steps with settings that need no tuning but eps, and the recipe of training that goes with them.

    The settings and the recipe are ours, from single trials with small networks on Fashion-MNIST (docs/recipe.md); the
    search that would choose them on validation is ``studies/claims-gambeson.yaml``. Any of them can be set; fields of
    the recipe that are given go before those of the preset.
    """

    speed: Speed = "best"
    """Length of the training: 10 epochs (``fast``) or 40 (``best``)."""
    warmup: Annotated[Number, Field(ge=0, le=1)] = 0.0
    eps_warmup: Annotated[Number, Field(ge=0, le=1)] = 0.3

    @property
    def recipe(self) -> dict[str, Any]:
        """A learning rate of 0.1, and the mean of the weights over about a thousand steps."""
        return {"epochs": _EPOCHS[self.speed], "lr": 0.1, "warmup": 1.0, "ema": 0.999, "ema_warmup": True}


class StartedConsistency(BankConsistency):
    """The consistency of :class:`BankStarted`."""

    settings: BankStarted

    def scale(self, batch: Batch) -> float:
        """The share of their size that perturbations have at this point of the training."""
        steps = self.settings.eps_warmup * batch.steps * batch.epochs
        return min(1.0, (batch.step + 1) / steps) if steps else 1.0

    def moved(self, model: nn.Module, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """Return the perturbed images; the entries' gradient is that at the point where an image is evaluated."""
        moved = self.bank.perturb(batch.images, rows, self.scale(batch))
        own = self.stepping(batch)
        if not len(own):
            return moved
        stepped = moved.detach().clone()
        stepped[own] = perturb(batch.images[own], self.craft(model, batch, rows, own))
        return moved + (stepped - moved).detach()

    def stepping(self, batch: Batch) -> torch.Tensor:
        """Return the indices of the images that take a step of their own; an even share of every entry's."""
        own, (number, _) = len(batch.images), batch.place
        turn = torch.arange(number * own, number * own + own).div(len(self.bank.delta), rounding_mode="floor")
        share = self.settings.share
        return (((turn + 1) * share).floor() > (turn * share).floor()).nonzero()[:, 0].to(batch.images.device)

    def craft(self, model: nn.Module, batch: Batch, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the perturbations of the images ``own``, inside the ball of eps, or what that has grown to."""
        settings, images, scale = self.settings, batch.images[own], self.scale(batch)
        ball = Ball(eps=scale * settings.eps, norm=settings.norm)
        draw = generator(batch.seed, "noise", device=images.device)
        every = (batch.place[1] * len(batch.images), *images.shape[1:])
        noise = batch.mine(ball.uniform(every, draw).to(images))[own]
        with Victim(model, fast=FastPath(precision=settings.craft_precision)) as victim:
            solver = ProjectedGradient(victim=victim, ball=ball, loss=Loss(), per_image=True, task=batch.task)
            start = solver.project(scale * self.bank.delta[rows[own]] + settings.noise * noise, images)
            return solver.step(start, images, batch.labels[own], settings.row_step * ball.eps)[0]
