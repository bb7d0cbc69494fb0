"""A bank of perturbations that persist across batches, for training against universal perturbations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import average, generator
from gambeson.defenses.objective import Batch, TrainContext
from gambeson.threat import Ball, BoxGradient, perturb
from gambeson.victim import Victim

BankStart = Literal["zero", "uniform", "sign"]
"""Initial perturbation: zero, uniform in the ball, or random signs on its surface."""

Ascend = Literal["steepest", "normalised"]
"""Step direction: ``steepest`` in the norm (the gradient's sign in the norm inf), or along the
``normalised`` gradient, scaled to a step of the same norm. The two differ in the norm inf only."""

_MEMORY = 0.9  # decay of the strength per step


class UAPBank(nn.Module):
    """K perturbations inside a ball, stored in a buffer, each updated by the rows of a batch assigned to it.

    The perturbations enter the graph of the training loss as one leaf, so that one backward computes the gradients of
    the weights and of the perturbations. The step size does not depend on the weight of the loss.

    Args:
        context: of the objective.
        count: number of perturbations K.
        ball: the ball of the perturbations.
        rel_step_size: step size as a share of eps.
        start: initial perturbations.
        ascend: step direction.
        box_gradient: how the clip of the images to [0, 1] is differentiated.

    Attributes:
        delta: (K, C, H, W), in pixel units.
        strength: (K,), running mean of the value of a row under each; zero until known.
    """

    delta: torch.Tensor
    strength: torch.Tensor

    def __init__(
        self,
        context: TrainContext,
        *,
        count: int,
        ball: Ball,
        rel_step_size: float,
        start: BankStart = "uniform",
        ascend: Ascend = "steepest",
        box_gradient: BoxGradient = "exact",
    ) -> None:
        super().__init__()
        self.ball, self.length, self.ascend = ball, rel_step_size * ball.eps, ascend
        self.box_gradient: BoxGradient = box_gradient
        shape = (count, *context.train.shape)
        self.register_buffer("delta", self._drawn(shape, start, generator(context.seed, "pool")))
        self.register_buffer("strength", torch.zeros(count))
        self._leaf: torch.Tensor | None = None

    def perturb(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return clip(images + delta[rows], 0, 1), with a graph to the perturbations.

        Args:
            images: (N, C, H, W) in [0, 1].
            rows: (N,), the index of each image's perturbation.
        """
        if self._leaf is None:
            self._leaf = self.delta.detach().requires_grad_()
        # Indexing sums each perturbation's gradient in a fixed order on every device; index_select does not.
        return perturb(images, self._leaf if len(self._leaf) == 1 else self._leaf[rows], self.box_gradient)

    def maximise(self, model: nn.Module, batch: Batch, rows: torch.Tensor, loss: Loss) -> None:
        """Take one step up ``loss`` on a batch, with a separate forward and backward.

        The model is in evaluation mode, without parameter gradients.
        """
        shared = len(self.delta) == 1
        with Victim(model) as victim:
            solver = ProjectedGradient(
                victim=victim,
                ball=self.ball,
                loss=loss,
                box_gradient=self.box_gradient,
                task=batch.task,
            )
            gradient, _ = solver.gradient(self.delta if shared else self.delta[rows], batch.images, batch.labels)
        if not shared:
            gradient = torch.zeros_like(self.delta).index_put_((rows,), gradient, accumulate=True)
        self._move(gradient)

    def after_step(self) -> None:
        """Take one step along the gradient of the last backward, or of several of this batch; without one, none."""
        leaf, self._leaf = self._leaf, None
        if leaf is not None and leaf.grad is not None:
            self._move(leaf.grad)

    @torch.no_grad()
    def note(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Update ``strength`` with the mean of ``values`` (N,) for each perturbation, over all processes."""
        sums, counts = torch.zeros_like(self.strength), torch.zeros_like(self.strength)
        sums.index_put_((rows,), values.detach().float(), accumulate=True)
        counts.index_put_((rows,), torch.ones_like(values, dtype=torch.float32), accumulate=True)
        average([sums, counts])
        means = sums / counts.where(counts > 0, 1)
        known = torch.where(self.strength > 0, _MEMORY * self.strength + (1 - _MEMORY) * means, means)
        self.strength = torch.where(counts > 0, known, self.strength)

    @torch.no_grad()
    def replace_weakest(self, seed: int) -> None:
        """Redraw the perturbation of least strength uniformly; its strength is then unknown."""
        weakest = torch.nn.functional.one_hot(self.strength.argmin(), len(self.delta)).bool()
        fresh = self._drawn((1, *self.delta.shape[1:]), "uniform", generator(seed, "pool")).to(self.delta)
        self.delta = torch.where(weakest.view(-1, 1, 1, 1), fresh, self.delta)
        self.strength = self.strength.masked_fill(weakest, 0)

    @torch.no_grad()
    def _move(self, gradient: torch.Tensor) -> None:
        average([gradient])
        steepest = self.ball.steepest(gradient)
        if self.ascend == "normalised":
            size = self.ball.length(gradient).view(-1, 1, 1, 1)
            steepest = torch.where(size > 0, gradient / size.where(size > 0, 1), 0)
        self.delta = self.ball.project(self.delta + self.length * steepest)

    def _drawn(self, shape: tuple[int, ...], start: BankStart, draw: torch.Generator) -> torch.Tensor:
        if start == "zero":
            return torch.zeros(shape)
        return (self.ball.uniform if start == "uniform" else self.ball.signs)(shape, draw)


def mute(moved: torch.Tensor, keep: torch.Tensor) -> None:
    """Exclude some images from the perturbations' step, but not from the weights'.

    Args:
        moved: (N, C, H, W), the result of :meth:`UAPBank.perturb`, before its backward.
        keep: (N,), whether an image is included.
    """
    if moved.requires_grad:
        moved.register_hook(lambda gradient: gradient * keep.view(-1, 1, 1, 1).to(gradient))
