"""Stochastic gradient aggregation: many small-batch steps look ahead, their mean gradient takes the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gambeson.attacks.losses import Loss
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.base import Candidate, CraftingContext, LabelSource, UniversalAttack
from gambeson.base import Number, generator
from gambeson.threat import BoxGradient


class CleanLogit(Loss):
    """Minus the label's own logit: the loss that the public code of SGA has as its default."""

    def _answers(self, logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None) -> torch.Tensor:
        return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


@register("sga", source="Liu et al. 2023", cost="restarts x steps x rounds x batch_size")
class SGA(UniversalAttack):
    """Stochastic gradient aggregation (Liu et al., ICCV 2023, arXiv 2308.06015).

    For every large batch an inner perturbation starts at delta and takes a step on each small batch, ``rounds`` times
    over the large one; delta itself then takes one step along the mean of all inner gradients. One step costs
    ``rounds * batch_size`` forwards and backwards, so it has to be compared at equal gradients, not at equal steps.

    The paper runs 20 epochs over 10,000 images, which is ``steps=800``; the default here is ours and costs what
    :class:`StochasticPGD` costs by default. Its start is zero, with constant steps.
    """

    name: ClassVar[str] = "sga"

    steps: Annotated[int, Field(ge=1)] = 100
    """Outer steps per restart, one large batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 250
    """Images of a large batch."""
    inner_batch: Annotated[int, Field(ge=1)] = 10
    """Images of a small batch."""
    rounds: Annotated[int, Field(ge=1)] = 4
    """How often the inner steps go over the large batch (K of the paper)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.1
    """Length of an outer step as a share of eps."""
    rel_inner_step_size: Annotated[Number, Field(gt=0)] = 0.1
    """Length of an inner step as a share of eps."""
    loss: Literal["cross-entropy", "logit"] = "cross-entropy"
    """``cross-entropy``, truncated, as in the script for ImageNet; ``logit`` is the default of the public code:
    minus the logit of the label (untargeted only)."""
    truncate: Number | None = 9.0
    """Images whose cross-entropy is beyond this have no more say (beta of the paper)."""
    target_floor: Number = 0.05
    """Targeted only: an image whose cross-entropy to the target is below this has no more say."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """The first starts from zero, the others from random signs."""
    target: Annotated[int, Field(ge=0)] | None = None
    """Class that every image should be taken for; None: any wrong class."""
    labels: LabelSource = "prediction"
    """See :data:`gambeson.attacks.universal.base.LabelSource`."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; ``exact`` is the paper's."""

    @property
    def objective(self) -> Loss:
        """What is climbed, one value per image."""
        if self.target is not None:
            return Loss(targeted=True, truncate=self.target_floor)
        return CleanLogit() if self.loss == "logit" else Loss(truncate=self.truncate)

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        for restart, (kind, delta) in enumerate(context.starts(self.restarts, start)):
            solver, draw = context.solver(self.objective), generator(context.seed, "inner", restart)
            for images, labels in islice(context.stream(self.batch_size, restart), self.steps):
                targets = context.targets(images, labels)
                direction = self._aggregate(solver, delta, images, targets, draw)
                delta = solver.step_along(delta, images, direction, self.rel_step_size * self.eps)
            yield Candidate(start=kind, delta=delta)

    def _aggregate(
        self,
        solver: ProjectedGradient,
        delta: torch.Tensor,
        images: torch.Tensor,
        targets: torch.Tensor,
        draw: torch.Generator,
    ) -> torch.Tensor:
        """Sum the mean gradients of the small batches, each taken where the inner steps before it have led."""
        total, inner = torch.zeros_like(delta), delta
        for rows in self._small_batches(len(images), draw):
            rows = rows.to(images.device)
            gradient = solver.gradient(inner, images[rows], targets[rows])[0] / len(rows)
            total += gradient
            inner = solver.step_along(inner, images[rows], gradient, self.rel_inner_step_size * self.eps)
        return total

    def _small_batches(self, images: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
        for turn in range(self.rounds):
            # The large batch comes in random order already, so its first round needs no new one.
            order = torch.randperm(images, generator=draw) if turn else torch.arange(images)
            yield from order.split(self.inner_batch)
