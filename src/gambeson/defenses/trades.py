"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Config, Number, generator
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, SharedForward, Term, TrainContext
from gambeson.defenses.registry import register
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Victim


class Divergence(Config):
    """max over the ball of KL(p(x), p(x + delta)), one delta per image, p the softmax of the model."""

    eps: Eps
    norm: Norm = "inf"
    steps: Annotated[int, Field(ge=1)] = 10
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Step size as a share of eps."""
    noise: Annotated[Number, Field(gt=0)] = 0.001
    """Standard deviation of the random start, in pixel units; at zero the divergence has no gradient."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean divergence; the weights' gradient goes through both predictions, as in the public code."""
        return self.with_logits(model, batch)[1]

    def with_logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Also return the clean logits."""
        moved = perturb(batch.images, self.craft(model, batch))
        logits, other = batch.forward(model, batch.images), batch.forward(model, moved)
        return logits, _divergence(logits.log_softmax(1), other, batch).mean()

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Craft the perturbations, (N, C, H, W), with the model in evaluation mode (as in the public code)."""
        images, (_, processes) = batch.images, batch.place
        draw = generator(batch.seed, "trades", device=images.device)
        start = torch.randn((processes * len(images), *images.shape[1:]), generator=draw, device=images.device)
        with Victim(model) as victim:
            solver = ProjectedGradient(
                victim=victim, ball=Ball(eps=self.eps, norm=self.norm), loss=Loss(), per_image=True, exact_box=True
            )
            with torch.no_grad():
                clean = victim(images).log_softmax(1)
            delta = solver.project(self.noise * batch.mine(start).to(images), images)
            for _ in range(self.steps):
                point = perturb(images, delta).detach().requires_grad_()
                with torch.enable_grad():
                    value = _divergence(clean, victim(point), batch).sum()
                gradient = victim.gradient(value, point, len(images))
                delta = solver.step_along(delta, images, gradient, self.rel_step_size * self.eps)
        return delta


@register("trades", source="Zhang et al. 2019", cost="k + 2 / k + 2")
class Trades(Defense):
    """Minimise E[CE(f(x), y)] + beta * E[max over the ball of KL(p(x), p(x + delta))] (equation 5, beta = 1/lambda).

    The defaults are those of the paper and its code for CIFAR-10 at 8/255: beta 6, 10 steps of about 2/255, from a
    start x + 0.001 N(0, I). In the norm 2 the code instead normalises the gradient inside an optimiser; ours is
    the plain projected ascent.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    beta: Annotated[Number, Field(ge=0)] = 6.0
    """Weight of the divergence; 0 is standard training."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Gradient steps of the inner attack."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Step size as a share of eps."""
    noise: Annotated[Number, Field(gt=0)] = 0.001
    """Standard deviation of the inner attack's start, in pixel units."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Clean loss: share of the target spread over all classes."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean term and the divergence."""
        divergence = Divergence(
            eps=self.eps, norm=self.norm, steps=self.steps, rel_step_size=self.rel_step_size, noise=self.noise
        )
        clean = Clean(label_smoothing=self.label_smoothing)
        return {"clean": (1.0, clean), "divergence": (self.beta, divergence)}

    def build_objective(self, context: TrainContext) -> Objective:
        """Both terms, sharing one clean forward."""
        return SharedForward(self.terms())


def _divergence(clean: torch.Tensor, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """KL of each image, (N,), from clean log-probabilities and logits; averaged over the labelled pixels of each."""
    answers = F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)
    return batch.task.per_image(answers, batch.labels)
