"""Free adversarial training (Shafahi et al., NeurIPS 2019, arXiv 1904.12843)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Number, average, place
from gambeson.defenses.objective import Batch, Defense, Losses, Objective, TrainContext, batch_loss
from gambeson.defenses.registry import register
from gambeson.threat import Ball, Eps, Norm, perturb


@register("free-adversarial", source="Shafahi et al. 2019", cost="m / m, m optimiser steps")
class FreeAdversarial(Defense):
    """Train on every batch m times; each backward moves both the weights and the batch's perturbations (algorithm 1).

    A perturbation belongs to a place in the batch, not to an image: it persists from batch to batch. As a batch costs m
    plain steps, the paper divides the number of epochs by m; here ``epochs`` are taken as given, so divide them
    yourself for equal cost.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    replays: Annotated[int, Field(ge=1)] = 8
    """Steps m per batch."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 1.0
    """Step size of the perturbations as a share of eps."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with perturbations of zero."""
        return Replays(self, context)


class Replays(Objective):
    """The objective of :class:`FreeAdversarial`.

    Attributes:
        delta: (N, C, H, W), the perturbation of each place in the batch of all processes.
    """

    delta: torch.Tensor

    def __init__(self, settings: FreeAdversarial, context: TrainContext) -> None:
        super().__init__({})
        self.settings, self.ball = settings, Ball(eps=settings.eps, norm=settings.norm)
        self.register_buffer("delta", torch.zeros(place()[1] * context.batch_size, *context.train.shape))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the cross-entropy under the present perturbations."""
        return _losses(model, batch, perturb(batch.images, self.delta[self._own(batch)]))

    def optimizer_steps(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        """Yield m steps on all weights, and move the perturbations along the gradient of each."""
        own = self._own(batch)
        for _ in range(self.settings.replays):
            # The gradient is that at the clipped image, so that a black or white pixel can still move inwards.
            point = perturb(batch.images, self.delta[own]).detach().requires_grad_()
            yield _losses(model, batch, point), None
            if point.grad is not None:
                self._move(own, point.grad)

    @torch.no_grad()
    def _move(self, own: slice, gradient: torch.Tensor) -> None:
        # Every process has all perturbations, so that any of them can write the checkpoint: the mean of gradients that
        # are zero outside a process's own rows has the sign of their sum.
        whole = torch.zeros_like(self.delta)
        whole[own] = gradient
        average([whole])
        step = self.settings.rel_step_size * self.settings.eps * self.ball.steepest(whole)
        self.delta = self.ball.project(self.delta + step)

    @staticmethod
    def _own(batch: Batch) -> slice:
        """Return the rows of this process; the last batch of an epoch may be shorter."""
        rows = len(batch.images)
        return slice(batch.place[0] * rows, (batch.place[0] + 1) * rows)


def _losses(model: nn.Module, batch: Batch, moved: torch.Tensor) -> Losses:
    value = batch_loss(model, moved, batch)
    return {"loss": value, "adversarial": value.detach()}
