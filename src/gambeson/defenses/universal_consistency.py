"""Universal consistency (ours): predictions that a bank of perturbations does not change."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Number, generator
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, SharedForward, TrainContext
from gambeson.defenses.registry import register
from gambeson.defenses.uap_bank import BankStart, UAPBank, mute
from gambeson.threat import Ball, BoxGradient, Eps, Norm

Assignment = Literal["even", "random", "strong"]
"""Assignment of perturbations to images: ``even`` gives each the same number of images of the shuffled batch,
``random`` draws one per image, ``strong`` draws those with a recently larger term more often."""

Direction = Literal["forward", "reverse"]
"""``forward`` is KL(clean prediction, perturbed prediction), as in TRADES; ``reverse`` swaps the two."""


@register("universal-consistency", source="ours", cost="2 / 2 in one pass")
class UniversalConsistency(Defense):
    """Minimise E[CE(f(x), y)] + beta * E[KL(f(x), f(x + delta_k))] over a bank of perturbations that maximise it.

    Every image of a batch is assigned one of K perturbations, which persist for the whole training. Clean and perturbed
    images share one forward (and BatchNorm statistics), and one backward computes the gradients of weights and
    perturbations, so a step costs two plain ones for any K.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    bank: Annotated[int, Field(ge=1)] = 8
    """Number K of perturbations."""
    beta: Annotated[Number, Field(ge=0)] = 4.0
    """Weight of the consistency; 0 is standard training."""
    warmup: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Share of the training over which the weight rises linearly from zero."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Step size of a perturbation as a share of eps."""
    assignment: Assignment = "even"
    direction: Direction = "forward"
    detach_clean: bool = False
    """Detach the clean prediction in the consistency term."""
    truncate: Number | None = None
    """Images whose cross-entropy under their perturbation is above this are excluded from the perturbation's step, but
    not from the weights'."""
    restart: Annotated[int, Field(ge=0)] = 0
    """Redraw the weakest perturbation every so many steps; 0: never."""
    start: BankStart = "uniform"
    box_gradient: BoxGradient = "exact"
    """How the clip of the perturbed images is differentiated: see :data:`gambeson.threat.BoxGradient`."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with its initial bank."""
        bank = UAPBank(
            context,
            count=self.bank,
            ball=Ball(eps=self.eps, norm=self.norm),
            rel_step_size=self.rel_step_size,
            start=self.start,
            box_gradient=self.box_gradient,
        )
        term = BankConsistency(bank, self)
        return SharedForward({"clean": (1.0, Clean()), "consistency": (term.strain, term)})


class BankConsistency(nn.Module):
    """Mean divergence between the predictions on clean images and on images under the bank's perturbations.

    Args:
        bank: the perturbations.
        settings: of the defence.
    """

    def __init__(self, bank: UAPBank, settings: UniversalConsistency) -> None:
        super().__init__()
        self.bank, self.settings = bank, settings
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def strain(self, batch: Batch) -> float:
        """The weight at this point of the training."""
        warmup = self.settings.warmup
        return self.settings.beta * (min(1.0, batch.progress / warmup) if warmup else 1.0)

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean divergence, with a graph to the parameters and the perturbations."""
        return self.answers(model, batch)[1]

    def answers(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Also return the clean logits, for the clean term."""
        rows = self.rows(batch)
        moved = self.bank.perturb(batch.images, rows)
        clean, perturbed = model(torch.cat([batch.images, moved])).tensor_split(2)
        if self.settings.truncate is not None:
            mute(moved, batch.losses(perturbed.detach()) <= self.settings.truncate)
        fixed = clean.detach() if self.settings.detach_clean else clean
        apart = divergence(fixed, perturbed, self.settings.direction)
        values = batch.task.per_image(apart, batch.labels)
        self._seen.append((rows, values.detach()))
        return clean, values.mean()

    def rows(self, batch: Batch) -> torch.Tensor:
        """Return the index of each image's perturbation, (N,)."""
        count, device = len(self.bank.delta), batch.images.device
        number, processes = batch.place
        own = len(batch.images)
        if self.settings.assignment == "even":
            return torch.arange(number * own, number * own + own, device=device) % count
        odds = torch.ones(count, device=device)
        if self.settings.assignment == "strong":
            # Unknown strengths count as the highest.
            known = self.bank.strength.to(device)
            odds = torch.where(known > 0, known, known.max().clamp(min=1e-6))
        draw = generator(batch.seed, "pool", device=device)
        return batch.mine(torch.multinomial(odds, processes * own, replacement=True, generator=draw))

    def after_step(self, batch: Batch) -> None:
        """Update the perturbations and their strengths, and redraw the weakest one when due."""
        seen, self._seen = self._seen, []
        self.bank.after_step()
        if seen:
            self.bank.note(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        if self.settings.restart and (batch.step + 1) % self.settings.restart == 0:
            self.bank.replace_weakest(batch.seed)


def divergence(clean: torch.Tensor, perturbed: torch.Tensor, direction: Direction = "forward") -> torch.Tensor:
    """Kullback-Leibler divergence between two predictions, one value per prediction.

    Args:
        clean: logits (N, K) or (N, K, H, W).
        perturbed: logits of the same shape.
        direction: see :data:`Direction`.

    Returns:
        (N,) or (N, H, W), in nats.
    """
    p, q = clean.float().log_softmax(1), perturbed.float().log_softmax(1)
    if direction == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum(1)
