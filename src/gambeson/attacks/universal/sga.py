"""SGA: inner steps on small batches, whose mean gradient is the outer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gambeson.attacks.losses import Loss
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.target import OMEGA, TAU, LabelSource, TargetSetting
from gambeson.base import Number, generator, tracked
from gambeson.threat import BoxGradient
from gambeson.victim import Temperature


class CleanLogit(Loss):
    """Minus the logit of the label, the default loss of SGA's public code."""

    def _answers(self, logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None) -> torch.Tensor:
        return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


@register("sga", source="Liu et al. 2023", cost="restarts x steps x rounds x batch_size")
class SGA(UniversalAttack):
    """Stochastic gradient aggregation (Liu et al., ICCV 2023, arXiv 2308.06015).

    For every large batch an inner perturbation starts at delta and takes a step on each small batch, ``rounds`` times
    over the large one; delta then takes one step along the mean of all inner gradients. One step costs ``rounds *
    batch_size`` forwards and backwards, so compare it with other attacks at equal gradients, not at equal steps.

    The paper runs 20 epochs over 10,000 images, which is ``steps=800``; the default here is ours and has the cost of
    :class:`StochasticPGD`'s default. It starts from zero, with constant step sizes.
    """

    name: ClassVar[str] = "sga"

    steps: Annotated[int, Field(ge=1)] = 100
    """Outer steps per restart, one large batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 250
    """Images of a large batch."""
    inner_batch: Annotated[int, Field(ge=1)] = 10
    """Images of a small batch."""
    rounds: Annotated[int, Field(ge=1)] = 4
    """Inner passes over the large batch (the paper's K)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.1
    """Outer step size as a share of eps."""
    rel_inner_step_size: Annotated[Number, Field(gt=0)] = 0.1
    """Inner step size as a share of eps."""
    loss: Literal["cross-entropy", "logit"] = "cross-entropy"
    """``cross-entropy``, truncated, as in the script for ImageNet; ``logit`` is the default of the public code:
    minus the logit of the label (untargeted only)."""
    truncate: Number | None = 9.0
    """Images whose cross-entropy is beyond this have no gradient (the paper's beta)."""
    tau: Annotated[Number, Field(gt=0, le=1)] = TAU
    """Targeted only: images, or pixels, whose target has a probability above this have no gradient."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """The first starts from zero, the others from random signs."""
    target: TargetSetting = None
    """See :class:`gambeson.attacks.Target`, such as a class for every image; None: untargeted."""
    omega: Annotated[Number, Field(ge=0, le=1)] = OMEGA
    """Where a class is to be hidden: weight of its pixels; all others have 1 - omega (Metzen et al. 2017)."""
    labels: LabelSource = "prediction"
    """See :data:`gambeson.attacks.universal.target.LabelSource`."""
    temperature: Temperature = "auto"
    """See :data:`gambeson.victim.Temperature`."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; ``exact`` is the paper's."""

    @property
    def objective(self) -> Loss:
        """The objective, one value per image."""
        if self.target is not None:
            return Loss(targeted=True, tau=self.tau)
        return CleanLogit() if self.loss == "logit" else Loss(truncate=self.truncate)

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        for restart, (kind, delta) in enumerate(context.starts(self.restarts, start)):
            solver, draw = context.solver(self.objective), generator(context.seed, "inner", restart)
            batches = islice(context.batches(self.batch_size, restart), self.steps)
            for images, labels, rows in tracked(batches, f"restart {restart + 1}", self.steps):
                targets, weights = context.aims(images, labels, rows)
                direction = self._aggregate(solver, delta, images, targets, draw, weights)
                delta = solver.step_along(delta, images, direction, self.rel_step_size * self.eps)
            yield Candidate(start=kind, delta=delta)

    def _aggregate(
        self,
        solver: ProjectedGradient,
        delta: torch.Tensor,
        images: torch.Tensor,
        targets: torch.Tensor,
        draw: torch.Generator,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum the mean gradients of the small batches, each at the point reached by the previous inner steps."""
        total, inner = torch.zeros_like(delta), delta
        for rows in self._small_batches(len(images), draw):
            rows = rows.to(images.device)
            own = None if weights is None else weights[rows]
            gradient = solver.gradient(inner, images[rows], targets[rows], weights=own)[0] / len(rows)
            total += gradient
            inner = solver.step_along(inner, images[rows], gradient, self.rel_inner_step_size * self.eps)
        return total

    def _small_batches(self, images: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
        for turn in range(self.rounds):
            # The large batch is already in random order, so the first round is not shuffled.
            order = torch.randperm(images, generator=draw) if turn else torch.arange(images)
            yield from order.split(self.inner_batch)
