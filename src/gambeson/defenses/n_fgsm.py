"""Single-step adversarial training with strong noise, N-FGSM (de Jorge et al., NeurIPS 2022, arXiv 2202.01181)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Config, Number, generator
from gambeson.defenses.objective import Batch, Defense, Term, batch_loss
from gambeson.defenses.registry import register
from gambeson.threat import Ball, Eps, perturb
from gambeson.victim import BatchNormMode, FastPath, Precision, Victim


class NoisyStep(Config):
    """Cross-entropy after uniform noise and one step up it, which is not projected onto the ball."""

    eps: Eps
    noise: Annotated[Number, Field(ge=0)] = 2.0
    """Half-width of the noise as a multiple of eps."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 1.0
    """Step size as a share of eps."""
    precision: Precision = "float32"
    attack_bn: BatchNormMode = "eval"

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy of the perturbed images."""
        return batch_loss(model, self.craft(model, batch), batch)

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return clip(x + noise + step, 0, 1), (N, C, H, W)."""
        images = batch.images
        draw = generator(batch.seed, "noise", device=images.device)
        every = (batch.place[1] * len(images), *images.shape[1:])
        noise = batch.mine(Ball(eps=self.noise * self.eps).uniform(every, draw).to(images))
        with Victim(model, fast=FastPath(precision=self.precision), batch_norm=self.attack_bn) as victim:
            solver = ProjectedGradient(
                victim=victim, ball=Ball(eps=self.eps), loss=Loss(), per_image=True, task=batch.task
            )
            gradient, _ = solver.gradient(noise, images, batch.labels)
        return perturb(images, noise + self.rel_step_size * self.eps * gradient.sign())


@register("n-fgsm", source="de Jorge et al. 2022", cost="2 / 2")
class NFGSM(Defense):
    """Minimise E[CE(f(x + eta + alpha sign(grad CE(f(x + eta), y))), y)], eta uniform in [-k eps, k eps] (algorithm 1).

    The step starts from noise beyond the ball and is not projected onto it, which is what keeps single-step training
    from catastrophic overfitting; only the perturbed images are clipped to [0, 1]. The defaults, k = 2 and alpha = eps,
    are the paper's.
    """

    eps: Eps
    """Radius of the norm inf in pixel units."""
    noise: Annotated[Number, Field(ge=0)] = 2.0
    """Half-width k of the noise as a multiple of eps."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 1.0
    """Step size alpha as a share of eps."""
    craft_precision: Precision = "float32"
    """Precision of the model while crafting, independent of the recipe's."""
    attack_bn: BatchNormMode = "eval"
    """BatchNorm statistics while crafting; see :class:`gambeson.defenses.PGDAdversarial`. The default is ours."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The adversarial term."""
        term = NoisyStep(
            eps=self.eps,
            noise=self.noise,
            rel_step_size=self.rel_step_size,
            precision=self.craft_precision,
            attack_bn=self.attack_bn,
        )
        return {"adversarial": (1.0, term)}
