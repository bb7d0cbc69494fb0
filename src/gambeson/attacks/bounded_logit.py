"""Bounded-logit universal perturbations (DF-UAP): Adam on a clamped logit margin, on real or proxy images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from gambeson.attacks.adam import Adam
from gambeson.attacks.crafting import LabelSource, UniversalAttack
from gambeson.attacks.losses import image_means, margin
from gambeson.attacks.workshop import Candidate, Objective, Workshop
from gambeson.base import Number
from gambeson.threat import BoxGradient


class BoundedLogit(UniversalAttack):
    """DF-UAP (Zhang et al., CVPR 2020): Adam on delta against a logit loss that is bounded by ``confidence``.

    Untargeted it climbs min(max_{i != y} z_i - z_y, kappa), targeted it descends max(max_{i != t} z_i - z_t, -kappa)
    with the rival logit held fixed. Needs no labels where ``labels`` is ``prediction``, and any images will do:
    ``craft(model, proxy_images)`` takes images of another data set alone.

    The public script runs 2,000 steps of batch 32 with learning rate 0.005 at eps 10/255 and kappa 10; ``step`` is
    that rate as a share of eps. Steps and batch here are ours, at equal cost to one restart of
    :class:`StochasticPGD`; so is the clip to [0, 1], which ``clip=False`` leaves out while crafting.
    """

    name: ClassVar[str] = "bounded-logit"

    steps: Annotated[int, Field(ge=1)] = 200
    """Adam steps a restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step."""
    step: Annotated[Number, Field(gt=0)] = 0.005 * 255 / 10
    """Adam's learning rate as a share of eps."""
    confidence: Annotated[Number, Field(ge=0)] = 10.0
    """An image whose logit margin is beyond this has no more say (kappa)."""
    betas: tuple[Number, Number] = (0.9, 0.999)
    """Adam's decay rates."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """The first starts from zero, as in the paper; the others from random signs."""
    target: Annotated[int, Field(ge=0)] | None = None
    """Class that every image should be taken for; None: any wrong class."""
    labels: LabelSource = "prediction"
    """See :data:`gambeson.attacks.crafting.LabelSource`."""
    clip: bool = True
    """Clip x + delta to [0, 1] while crafting; the public code does not. Rates are always taken clipped."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; without ``clip`` it has no meaning."""

    @property
    def objective(self) -> Objective:
        """What is climbed, one value an image."""
        return self._targeted if self.target is not None else self._untargeted

    def _untargeted(self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
        answers = margin(logits, labels, ignore_index).clamp(max=self.confidence)
        return image_means(answers, labels, ignore_index)

    def _targeted(self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
        index = labels.unsqueeze(1)
        rival = logits.detach().scatter(1, index, -torch.inf).amax(1)
        answers = (logits.gather(1, index).squeeze(1) - rival).clamp(max=self.confidence)
        return image_means(answers, labels, ignore_index)

    def _search(self, work: Workshop, start: torch.Tensor | None) -> Iterable[Candidate]:
        for restart, (kind, delta) in enumerate(work.starts(self.restarts, start)):
            adam = Adam.like(delta, self.betas)
            for images, labels in islice(work.stream(self.batch_size, restart), self.steps):
                goals = work.goals(images, labels)
                if self.clip:
                    gradient = work.gradient(delta, images, goals, self.objective)
                else:
                    gradient = self._unclipped(work, delta, images, goals)
                move = adam.direction(gradient / len(images))
                delta = work.ball.project(delta + self.step * self.eps * move)
            yield Candidate(start=kind, delta=delta)

    def _unclipped(
        self, work: Workshop, delta: torch.Tensor, images: torch.Tensor, goals: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            point = delta.detach().requires_grad_()
            return work.differentiate(work.value(images + point, goals, self.objective), point, images)
