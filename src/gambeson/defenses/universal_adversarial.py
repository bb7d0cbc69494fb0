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
from gambeson.defenses.universal_consistency import Ascend, BankStart, UAPBank, mute
from gambeson.threat import Ball, BoxGradient, Eps, Norm

Update = Literal["alternating", "one-pass"]


@register("universal-adversarial", source="Shafahi et al. 2020", cost="2 / 2, in one pass 1 / 1")
class UniversalAdversarial(Defense):
    """Minimise over the weights, and maximise over one perturbation for all images, E[CE(f(x + delta), y)].

    The perturbation persists for the whole training and takes one step of size eps per batch (from the paper).
    ``alternating``: after the step of the weights, with a separate forward and backward on the same batch, with the
    model in evaluation mode (ours). ``one-pass``, the paper's low-cost form: one backward computes both gradients. A
    step costs two forwards and two backwards, or one and one.

    The paper's truncation and start are not known to us: those defaults are ours.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    update: Update = "alternating"
    """Whether the perturbation's step has a separate backward."""
    classwise: bool = False
    """One perturbation per class, for its images (Benz et al. 2021, arXiv 2104.03000)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 1.0
    """Step size of the perturbation as a share of eps."""
    ascend: Ascend = "steepest"
    """Direction of that step: see :data:`gambeson.defenses.universal_consistency.Ascend`."""
    truncate: Number | None = 9.0
    """Images whose cross-entropy is above this (the paper's beta) are excluded from the perturbation's step, but not
    from the weights'. Label maps: per pixel if the update alternates, by the image's mean in one pass."""
    start: BankStart = "zero"
    box_gradient: BoxGradient = "exact"
    """``straight-through`` lets a value leave a point at which most images are clipped (ours, not the paper's)."""
    sigma: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """Weight of the perturbed images; clean images have the rest, as in shared adversarial training. The paper's form
    has no clean term."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with its initial perturbation.

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
    """Mean cross-entropy under persistent perturbations: one for all images, or one per class.

    Args:
        bank: one perturbation, or one per class.
        update: whether their step has a separate backward.
        truncate: cap of the cross-entropy in their step.
    """

    def __init__(self, bank: UAPBank, *, update: Update, truncate: float | None) -> None:
        super().__init__()
        self.bank, self.update, self.truncate = bank, update, truncate
        self._last: tuple[nn.Module] | None = None  # in a tuple: the model is not part of this module

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss on a batch, with a graph to the parameters and the perturbations."""
        self._last = (model,)
        moved = self.bank.perturb(batch.images, self._rows(batch))
        if self.update == "alternating":
            moved = moved.detach()
        values = batch.losses(batch.forward(model, moved))
        if self.update == "one-pass" and self.truncate is not None:
            mute(moved, values <= self.truncate)
        return values.mean()

    def after_step(self, batch: Batch) -> None:
        """Update the perturbations on the batch on which the weights were just updated."""
        last, self._last = self._last, None
        if last is None:
            return
        if self.update == "alternating":
            self.bank.maximise(last[0], batch, self._rows(batch), Loss(truncate=self.truncate))
        self.bank.after_step()

    def _rows(self, batch: Batch) -> torch.Tensor:
        return batch.labels if len(self.bank.delta) > 1 else batch.labels.new_zeros(len(batch.images))
