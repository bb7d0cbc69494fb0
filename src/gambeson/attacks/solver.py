"""The one solver: a step of projected gradient ascent on a perturbation that its shape says who shares.

FGSM is one step, R+FGSM one from a random start, PGD many; the same step on heaps is the inner attack of
Shared Adversarial Training, and over a stream of mini-batches with one row it is stochastic PGD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gambeson.attacks.losses import Loss
from gambeson.base import UserError
from gambeson.threat import Ball, BoxGradient, perturb
from gambeson.victim import Victim


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Projected gradient ascent in a ball, on one victim, for one loss."""

    victim: Victim
    ball: Ball
    loss: Loss
    per_image: bool = False
    """Each image has a perturbation of its own; it is then kept free of what the clip would take away again.
    A shared one is not: what saturates one image still moves the others."""
    box_gradient: BoxGradient = "exact"
    ignore_index: int | None = None

    def start(
        self, images: torch.Tensor, rows: int, kind: str, size: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Return ``rows`` starting points: ``zero``, ``uniform`` in the ball, or random ``sign``s.

        Args:
            images: (N, C, H, W), for shape, dtype and device.
            rows: number of perturbations.
            kind: the kind of start.
            size: radius of the start as a share of eps.
            generator: on the images' device.
        """
        shape = (rows, *images.shape[1:])
        if kind == "zero":
            return images.new_zeros(shape)
        draw = self.ball.uniform if kind == "uniform" else self.ball.signs
        return self._hold(draw(shape, generator).to(images.dtype) * size, images)

    def step(
        self, delta: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, length: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step of ``length`` (pixel units) up the loss.

        Args:
            delta: (R, C, H, W) with R a divisor of N.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) or (N, H, W); targets where the loss is targeted.
            length: norm of the step, in pixel units.

        Returns:
            The new delta, inside the ball, and the logits before the step.

        Raises:
            UserError: the gradient is not finite.
        """
        with torch.enable_grad():  # an attack called under no_grad still needs gradients
            point = delta.detach().requires_grad_()
            logits = self.victim(perturb(images, point, self.box_gradient))
            value = self.loss(logits, labels, self.ignore_index).sum()
            gradient = self.victim.gradient(value, point, len(images))
        if not torch.isfinite(gradient.sum()):
            raise UserError(
                "the model's gradient is NaN or infinite: no attack can follow it; check the model's weights and outputs"
            )
        moved = delta.detach() + length * self.ball.steepest(gradient)
        return self._hold(self.ball.project(moved), images), logits.detach()

    def run(
        self,
        delta: torch.Tensor,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        lengths: Iterable[float],
    ) -> torch.Tensor:
        """Take one step a length, each on the next batch; return the last delta."""
        for (images, labels), length in zip(batches, lengths, strict=False):
            delta, _ = self.step(delta, images, labels, length)
        return delta

    def _hold(self, delta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(delta, -images), 1 - images) if self.per_image else delta
