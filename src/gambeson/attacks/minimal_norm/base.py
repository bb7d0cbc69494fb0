"""What the attacks that look for the smallest perturbation share: their bound, their checks, their way in and out."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from gambeson.attacks.query.base import attacked, working
from gambeson.base import Config, UserError
from gambeson.base.checks import check_batch
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.tasks import of as task_of
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Victim


class MinimalNorm(Config):
    """Base of DeepFool and Carlini-Wagner: a search without a bound, and a projection after it where there is one."""

    eps: Eps | None = None
    """Radius in pixel units; what is found beyond it is projected to the ball, and may then succeed no more.
    None: no bound."""

    @property
    def small_in(self) -> Norm:
        """Norm that is made small."""
        return "2"

    def __call__(
        self,
        model: nn.Module | Victim,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
    ) -> torch.Tensor:
        """Attack a batch.

        Args:
            model: any module from pixels to logits (N, K), or a :class:`Victim` already entered.
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels, or targets where the attack is targeted.
            seed: not used; nothing is drawn.
            task: what the labels mean; images whose label does not count are left alone.

        Raises:
            UserError: images outside [0, 1], one label per pixel, or a gradient that is not finite.
        """
        if not isinstance(model, Victim):
            with Victim(model) as victim:
                return self(victim, x, y, seed=seed, task=task)
        images = check_batch(x, y)
        rows = attacked(y, task_of(y) if task is None else task)
        if len(rows) == 0 or self.eps == 0:
            return images
        found = self.search(model, working(images), y, rows)
        if self.eps is None:
            return found.clamp(0, 1).to(images.dtype)
        delta = Ball(eps=self.eps, norm=self.small_in).project(found - working(images))
        return perturb(images, delta.to(images.dtype))

    @abstractmethod
    def search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return what was found for the images numbered ``rows`` (A,), (N, C, H, W); the others as they are.

        Neither the ball nor the box is kept here; x and y are as the call takes them, in float32 or float64.
        """


def refuse_odd_head(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse a model that does not give one row of scores per image, and labels that it has no score for.

    Args:
        logits: what the model answered.
        labels: (N,)

    Raises:
        UserError: either.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(
            f"the model answers with shape {tuple(logits.shape)}: expected logits (N, K) with K of at least 2; "
            "for label maps choose a gradient attack such as PGD"
        )
    CLASSIFICATION.check_labels(labels, logits.shape[1])


def refuse_non_finite(*values: torch.Tensor, step: int) -> None:
    """Refuse logits or gradients that are not finite.

    Args:
        values: what the step looked at.
        step: its number, counted from 1.

    Raises:
        UserError: some are NaN or infinite.
    """
    if not all(bool(value.detach().isfinite().all()) for value in values):
        raise UserError(
            f"the model's logits or gradient are NaN or infinite at step {step}: no attack can follow them; "
            "check the model's weights and outputs"
        )
