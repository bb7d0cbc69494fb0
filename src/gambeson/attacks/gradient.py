"""Gradient attacks with one perturbation an image: FGSM, R+FGSM and PGD, as settings of one loop."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss, fallen
from gambeson.attacks.solver import Ascent
from gambeson.base import Config, Number, generator
from gambeson.base.checks import check_batch
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Victim

Start = Literal["zero", "uniform", "sign"]


class PGD(Config):
    """Projected gradient descent (Madry et al. 2018, section 2.1; Kurakin et al. 2017 with ``start="zero"``).

    Call it: ``PGD(eps="8/255")(model, x, y)`` returns images of the shape, dtype and device of ``x``, inside the
    ball and inside [0, 1]. Several restarts keep, for each image, a perturbation that succeeds, else the one with
    the highest loss. The length of a step and the number of restarts are not fixed by the paper; they are ours.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    """Norm of the ball and of the step."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Gradient steps a restart."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Length of a step as a share of eps; 4 / steps where it is not given. The customary 2.5 / steps stops one to
    three per cent short of the optimum of a linear model in the Euclidean ball; 4 / steps, a tenth of one."""
    start: Start = "uniform"
    """Where a restart begins; ``zero`` makes every restart but the first pointless."""
    start_size: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """Radius of the random start as a share of eps."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Independent starts."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    margin: bool = False
    """Climb the margin of the logits (Carlini and Wagner) instead of cross-entropy."""
    early_stop: bool = True
    """Stop working on an image once it has fallen."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def lengths(self) -> list[float]:
        """Length of each step in pixel units."""
        share = 4 / self.steps if self.step is None else self.step
        return [share * self.eps] * self.steps

    def __call__(
        self,
        model: nn.Module | Victim,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        ignore_index: int | None = None,
    ) -> torch.Tensor:
        """Attack a batch.

        Args:
            model: any module from pixels to logits, or a :class:`Victim` already entered.
            x: (N, C, H, W) in [0, 1].
            y: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of the random starts.
            ignore_index: label that counts nowhere.

        Raises:
            UserError: images outside [0, 1], or a model and images that do not fit.
        """
        if not isinstance(model, Victim):
            with Victim(model) as victim:
                return self(victim, x, y, seed=seed, ignore_index=ignore_index)
        images = check_batch(x, y)
        loss = Loss(margin=self.margin, targeted=self.targeted)
        ascent = Ascent(victim=model, ball=self.ball, loss=loss, per_image=True, ignore_index=ignore_index)
        delta = self._search(ascent, images.float(), y, seed)
        return perturb(images, delta.to(images.dtype)).detach()

    def _search(self, ascent: Ascent, x: torch.Tensor, y: torch.Tensor, seed: int) -> torch.Tensor:
        best = torch.zeros_like(x)
        best_loss = x.new_full((len(x),), -torch.inf)
        standing = torch.arange(len(x), device=x.device)  # images that no restart has broken yet
        for restart in range(self.restarts):
            if len(standing) == 0:
                break
            draw = generator(seed, "start", restart, device=x.device)
            # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
            delta = ascent.start(x, len(x), self.start, self.start_size, draw)[standing]
            rows, images, labels = standing, x[standing], y[standing]
            for length in self.lengths:
                moved, logits = ascent.step(delta, images, labels, length)
                down = fallen(logits, labels, ascent.ignore_index, targeted=self.targeted)
                if self.early_stop and bool(down.any()):
                    best[rows[down]], best_loss[rows[down]] = delta[down], torch.inf
                    rows, images, labels, moved = (t[~down] for t in (rows, images, labels, moved))
                delta = moved
                if len(rows) == 0:
                    break
            if len(rows):
                with torch.no_grad():
                    logits = ascent.victim(perturb(images, delta))
                value = ascent.loss(logits, labels, ascent.ignore_index)
                value[fallen(logits, labels, ascent.ignore_index, targeted=self.targeted)] = torch.inf
                better = value > best_loss[rows]
                best[rows[better]], best_loss[rows[better]] = delta[better], value[better]
            standing = (best_loss < torch.inf).nonzero().flatten()
        return best


class FGSM(PGD):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length eps from the image itself."""

    steps: Literal[1] = 1
    step: Annotated[Number, Field(gt=0)] | None = 1.0
    start: Start = "zero"
    early_stop: bool = False


class RFGSM(PGD):
    """R+FGSM (Tramèr et al. 2018, section 3.4): a random-sign step of alpha, then a gradient step of eps - alpha.

    ``start_size`` is alpha / eps: 0.5 in the paper's ImageNet experiments; its MNIST code uses 0.05 at eps 0.3.
    """

    steps: Literal[1] = 1
    start: Start = "sign"
    start_size: Annotated[Number, Field(ge=0, le=1)] = 0.5
    early_stop: bool = False

    @property
    def lengths(self) -> list[float]:
        """The one step: what the random start has left of eps, unless ``step`` says otherwise."""
        return [(1 - self.start_size if self.step is None else self.step) * self.eps]
