"""Universal Adversarial Training (Shafahi et al., AAAI 2020, arXiv 1811.11304) and its class-wise form."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.base import Number
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, TrainContext
from gambeson.defenses.registry import register
from gambeson.defenses.uap_bank import Ascend, BankStart, UAPBank, mute
from gambeson.threat import Ball, BoxGradient, Eps, Norm

Update = Literal["alternating", "one-pass"]


@register("universal-adversarial", source="Shafahi et al. 2020", cost="2 / 2, in one pass 1 / 1")
class UniversalAdversarial(Defense):
    """Minimise over the weights, and maximise over one perturbation for all images, E[CE(f(x + delta), y)].

    The perturbation lives as long as the training and takes one step of length eps a batch (from the paper).
    ``alternating``: after the step of the weights, by a forward and a backward of its own on the same batch, with
    the model in evaluation mode (our choice). ``one-pass``, the paper's low-cost form: the backward that gives the
    weights' gradient gives the perturbation's too. A step costs two forwards and two backwards, or one and one.

    Which truncation and which start the paper trains with is not known to us: those defaults are ours.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    update: Update = "alternating"
    """Whether the perturbation's step has a backward of its own."""
    classwise: bool = False
    """One perturbation for every class, carried by its images (Benz et al. 2021, arXiv 2104.03000)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 1.0
    """Length of the perturbation's step as a share of eps."""
    ascend: Ascend = "steepest"
    """Direction of that step: see :data:`gambeson.defenses.uap_bank.Ascend`."""
    truncate: Number | None = 9.0
    """An image whose cross-entropy is above this (the paper's beta) has no say in the perturbation's step, and its
    full say in the weights'. Label maps: per pixel where the update alternates, by the image's mean in one pass."""
    start: BankStart = "zero"
    box_gradient: BoxGradient = "exact"
    """``straight-through`` lets a pixel leave a value at which it clips most images (ours, not the paper's)."""
    sigma: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """Weight of the perturbed images; the rest is the clean ones', as in shared adversarial training. The paper's
    form has no clean term."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with its perturbation at the start.

        Raises:
            UserError: label maps, which have no class per image, with ``classwise``.
        """
        if self.classwise:
            context.train.task.require_classification("class-wise training", "use classwise=False")
        bank = UAPBank(
            context,
            count=len(context.train.classes) if self.classwise else 1,
            ball=Ball(eps=self.eps, norm=self.norm),
            rel_step_size=self.rel_step_size,
            start=self.start,
            ascend=self.ascend,
            box_gradient=self.box_gradient,
        )
        term = UniversalRisk(bank, update=self.update, truncate=self.truncate)
        return Objective({"adversarial": (self.sigma, term), "clean": (1 - self.sigma, Clean())})


class UniversalRisk(nn.Module):
    """Mean cross-entropy under kept perturbations: one for all images, or each class's for its images.

    Args:
        bank: one perturbation, or one a class.
        update: whether their step has a backward of its own.
        truncate: cap of the cross-entropy in their step.
    """

    def __init__(self, bank: UAPBank, *, update: Update, truncate: float | None) -> None:
        super().__init__()
        self.bank, self.update, self.truncate = bank, update, truncate
        self._last: tuple[nn.Module] | None = None  # in a tuple: the model is no part of this module

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss on a batch, with a graph to the parameters and the perturbations."""
        self._last = (model,)
        moved = self.bank.perturb(batch.images, self._rows(batch))
        if self.update == "alternating":
            moved = moved.detach()
        values = batch.losses(model(moved))
        if self.update == "one-pass" and self.truncate is not None:
            mute(moved, values <= self.truncate)
        return values.mean()

    def after_step(self, batch: Batch) -> None:
        """Let the perturbations take their step on the batch that the weights have just taken theirs on."""
        last, self._last = self._last, None
        if last is None:
            return
        if self.update == "alternating":
            self.bank.climb(last[0], batch, self._rows(batch), Loss(truncate=self.truncate))
        self.bank.after_step()

    def _rows(self, batch: Batch) -> torch.Tensor:
        return batch.labels if len(self.bank.delta) > 1 else batch.labels.new_zeros(len(batch.images))
