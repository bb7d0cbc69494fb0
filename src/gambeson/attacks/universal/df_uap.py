"""DF-UAP: Adam on a bounded logit margin, on real or proxy images."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from gambeson.attacks.losses import Loss
from gambeson.attacks.registry import register
from gambeson.attacks.solver import Adam, ProjectedGradient, require_finite
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.target import OMEGA, LabelSource, TargetSetting
from gambeson.base import Number, tracked
from gambeson.threat import BoxGradient
from gambeson.victim import Temperature


class RivalLogit(Loss):
    """Margin of a target over the best other logit, which is detached, bounded by ``-truncate``."""

    targeted: bool = True

    def _answers(self, logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None) -> torch.Tensor:
        index = labels.unsqueeze(1)
        rival = logits.detach().scatter(1, index, -torch.inf).amax(1)
        return rival - logits.gather(1, index).squeeze(1)


@register("df-uap", source="Zhang et al. 2020", cost="restarts x steps x batch_size")
class DFUAP(UniversalAttack):
    """DF-UAP (Zhang et al., CVPR 2020): Adam on delta against a logit loss that is bounded by ``confidence``.

    Untargeted it maximises min(max_{i != y} z_i - z_y, kappa), targeted it minimises max(max_{i != t} z_i - z_t,
    -kappa) with the rival logit detached. With ``labels="prediction"`` it needs no labels, and works with any images:
    ``craft(model, proxy_images)`` uses images of another data set.

    The public script runs 2,000 steps of batch 32 with learning rate 0.005 at eps 10/255 and kappa 10;
    ``rel_step_size`` is that rate as a share of eps. Steps and batch size here are ours, at the cost of one restart of
    :class:`StochasticPGD`; so is the clip to [0, 1] while crafting (``clip=False`` turns it off).
    """

    name: ClassVar[str] = "df-uap"

    steps: Annotated[int, Field(ge=1)] = 200
    """Adam steps per restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images per step."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.005 * 255 / 10
    """Adam's learning rate as a share of eps."""
    confidence: Annotated[Number, Field(ge=0)] = 10.0
    """Images whose logit margin is beyond this have no gradient (kappa)."""
    betas: tuple[Number, Number] = (0.9, 0.999)
    """Adam's decay rates."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """The first starts from zero, as in the paper; the others from random signs."""
    target: TargetSetting = None
    """See :class:`gambeson.attacks.Target`, such as a class for every image; None: untargeted."""
    omega: Annotated[Number, Field(ge=0, le=1)] = OMEGA
    """Where a class is to be hidden: weight of its pixels; all others have 1 - omega (Metzen et al. 2017)."""
    labels: LabelSource = "prediction"
    """See :data:`gambeson.attacks.universal.target.LabelSource`."""
    temperature: Temperature = "auto"
    """See :data:`gambeson.victim.Temperature`."""
    clip: bool = True
    """Clip x + delta to [0, 1] while crafting; the public code does not. Rates are always computed with clipping."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; without ``clip`` it has no effect."""

    @property
    def objective(self) -> Loss:
        """The objective, one value per image."""
        return (
            Loss(kind="margin", truncate=self.confidence)
            if self.target is None
            else RivalLogit(truncate=-self.confidence)
        )

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        for restart, (kind, delta) in enumerate(context.starts(self.restarts, start)):
            adam, solver = Adam.like(delta, self.betas), context.solver(self.objective)
            batches = islice(context.batches(self.batch_size, restart), self.steps)
            for images, labels, rows in tracked(batches, f"restart {restart + 1}", self.steps):
                targets, weights = context.aims(images, labels, rows)
                if self.clip:
                    gradient, _ = solver.gradient(delta, images, targets, weights=weights)
                else:
                    gradient = _unclipped(solver, delta, images, targets, weights)
                move = adam.direction(gradient / len(images))
                delta = context.ball.project(delta + self.rel_step_size * self.eps * move)
            yield Candidate(start=kind, delta=delta)


def _unclipped(
    solver: ProjectedGradient,
    delta: torch.Tensor,
    images: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    with torch.enable_grad():
        point = delta.detach().requires_grad_()
        logits, values = solver.forward(images + point, targets, weights=weights)
        gradient = solver.victim.gradient(values.sum(), point, len(images))
    require_finite([gradient.sum()], done=partial(solver.done, logits.detach(), targets))
    return gradient
