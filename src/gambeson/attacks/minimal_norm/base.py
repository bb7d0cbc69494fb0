"""Base class and checks of the minimal-norm attacks."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from gambeson.attacks.query.base import attacked, working
from gambeson.attacks.solver import NON_FINITE
from gambeson.base import Config, UserError
from gambeson.tasks import Task, as_pair
from gambeson.threat import Ball, Eps, Norm, landed, perturb
from gambeson.victim import Source, Victim, as_victim


class MinimalNorm(Config):
    """Base of DeepFool and Carlini-Wagner: an unbounded search, followed by a projection if there is a bound."""

    gradients: ClassVar[bool] = True

    eps: Eps | None = None
    """Radius in pixel units; larger perturbations are projected onto the ball, and may then fail. None: no bound."""

    @property
    def small_in(self) -> Norm:
        """Norm that is minimised."""
        return "2"

    def __call__(
        self,
        model: Source,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
    ) -> torch.Tensor:
        """Attack a batch.

        Args:
            model: any module from pixels to logits (N, K), an entered :class:`Victim`, or a list of models, whose mean
                logits are attacked.
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels, or targets where the attack is targeted.
            seed: not used; nothing is drawn.
            task: what the labels mean; images whose label does not count are left alone.

        Raises:
            UserError: images outside [0, 1], one label per pixel, a random model, or a gradient that is not finite.
        """
        images, labels, task = as_pair(x, y, task, floats=True)
        task.require_classification("this attack", "for label maps choose a gradient attack such as PGD")
        rows = attacked(labels, task)
        if len(rows) == 0 or self.eps == 0:
            return images.clone()
        with as_victim(model, gradients=type(self).__name__) as victim:
            traits = victim.inspect(working(images))
            task.check_logits(traits.shape, labels)
            traits.require_fixed("choose a gradient attack such as PGD with eot_samples=20")
            found = self.search(victim, working(images), labels, rows)
        if self.eps is None:
            return found.clamp(0, 1).to(images.dtype)
        delta = Ball(eps=self.eps, norm=self.small_in).project(found - working(images))
        return landed(images, perturb(images, delta))

    @abstractmethod
    def search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the images (N, C, H, W) after attacking those with indices ``rows`` (A,).

        Neither ball nor box is enforced here; x and y are those of the call, in float32 or float64.
        """


def refuse_non_finite(*values: torch.Tensor, step: int) -> None:
    """Raise if logits or gradients are not finite.

    Args:
        values: logits and gradients of the step.
        step: its number, counted from 1.

    Raises:
        UserError: some are NaN or infinite.
    """
    if not all(bool(value.detach().isfinite().all()) for value in values):
        raise UserError(
            f"the model's logits or gradient are NaN or infinite at step {step}: no attack can follow them; "
            f"{NON_FINITE}"
        )
