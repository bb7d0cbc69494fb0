"""NES and SPSA: gradients estimated from pairs of scores, and projected steps along them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.attacks.query.base import InfOr2, QueryAttack, QueryLoss, Search
from gambeson.attacks.registry import register
from gambeson.attacks.solver import Adam
from gambeson.base import Number, generator
from gambeson.threat import Ball, Eps, perturb


@register("nes", source="Ilyas et al. 2018", cost="at most queries / 0")
class NES(QueryAttack):
    """Natural evolution strategies (Ilyas et al. 2018, section 2.2 and Algorithm 1): projected steps, no gradients.

    The gradient of the loss is (1 / 2 sigma n) sum u (F(x + sigma u) - F(x - sigma u)) over n Gaussian directions u,
    in antithetic pairs; a running mean of the estimates replaces the gradient of PGD. F is the cross-entropy for
    targets, as in the paper, and the margin if untargeted (ours), because the cross-entropy of a confident model rounds
    to zero; ``loss`` overrides this. The authors' code also halves the step size when the loss stalls, which is left
    out. The last step of the budget has fewer pairs. Cost: at most ``queries`` forwards per image: one for the image, 2
    ``pairs`` + 1 per step.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: InfOr2 = "inf"
    """Norm of the ball and of the step."""
    pairs: Annotated[int, Field(ge=1)] = 25
    """Antithetic pairs per step (authors' code: 50 samples)."""
    sigma: Annotated[Number, Field(gt=0)] = 0.001
    """Size of a probe in pixel units (the paper: 0.001)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.2
    """Step size as a share of eps (authors' code: 0.01 at eps 0.05); for Adam, its learning rate."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean (authors' code); for steepest steps."""
    directions: Literal["gaussian", "sign"] = "gaussian"
    """Distribution of a probe's values: normal, or random signs."""
    optimizer: Literal["steepest", "adam"] = "steepest"
    """Steepest steps in the norm (sign steps for inf), or Adam followed by a projection."""
    clip_probes: bool = True
    """Clip probes to [0, 1], so that only valid images are queried; the papers do not."""
    batch_size: Annotated[int, Field(ge=1)] = 512
    """Probes sent to the model at once; at least one per image."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def _null(self) -> bool:
        return self.eps == 0

    def _search(self, search: Search, seed: int) -> None:
        x = search.images
        draw = generator(seed, "estimate", device=x.device)
        delta = torch.zeros_like(x[search.active])
        mean, adam = torch.zeros_like(delta), Adam.like(delta)
        while len(search.active) and search.left >= 3:
            active = search.active
            images = x[active]
            gradient = self._estimate(search, perturb(images, delta), draw)
            if self.optimizer == "adam":
                moved = delta + self.rel_step_size * self.eps * adam.direction(gradient)
            else:
                mean = self.momentum * mean + (1 - self.momentum) * gradient
                moved = delta + self.rel_step_size * self.eps * self.ball.steepest(mean)
            delta = self.ball.project_in_box(moved, -images, 1 - images)
            search.offer(perturb(images, delta))
            still = torch.isin(active, search.active)
            delta, mean, adam = delta[still], mean[still], adam.of(still)

    def _estimate(self, search: Search, points: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Return the estimated gradient of the loss at points (A, C, H, W); reserve a query for the step itself."""
        active, total = search.active, torch.zeros_like(points)
        pairs = min(self.pairs, (search.left - 1) // 2)
        at_once = max(1, self.batch_size // (2 * len(points)))
        for done in range(0, pairs, at_once):
            count = min(at_once, pairs - done)
            total += self._probe(search, points, active, count, draw)
        return total / (2 * self.sigma * pairs)

    def _probe(
        self, search: Search, points: torch.Tensor, active: torch.Tensor, count: int, draw: torch.Generator
    ) -> torch.Tensor:
        shape = (count, len(search.images), *points.shape[1:])
        if self.directions == "gaussian":
            u = torch.randn(shape, generator=draw, device=draw.device)
        else:
            u = torch.randint(0, 2, shape, generator=draw, device=draw.device).float() * 2 - 1
        u = u[:, active].to(points.dtype)  # drawn for the whole batch, independently of which images are active
        probes = torch.cat([points + self.sigma * u, points - self.sigma * u])
        if self.clip_probes:
            probes = probes.clamp(0, 1)
        value, _ = search.ask(probes.flatten(0, 1), active.repeat(2 * count))
        ahead, behind = value.view(2, count, -1, 1, 1, 1)
        return (u * (ahead - behind).to(u.dtype)).sum(0)


@register("spsa", source="Uesato et al. 2018", cost="at most queries / 0")
class SPSA(NES):
    """Simultaneous perturbation (Uesato et al. 2018, section 3, Algorithm 1): random signs, the margin, and Adam.

    :class:`NES` with other defaults. The step size is the paper's 0.01 at eps 8/255; ``pairs`` is ours: the
    paper takes up to 8,192 samples per step, which leaves few steps for a small budget.
    """

    pairs: Annotated[int, Field(ge=1)] = 64
    """Antithetic pairs per step."""
    sigma: Annotated[Number, Field(gt=0)] = 0.01
    """Size of a probe in pixel units (the paper: 0.01)."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.3
    directions: Literal["gaussian", "sign"] = "sign"
    optimizer: Literal["steepest", "adam"] = "adam"

    @property
    def _default_loss(self) -> QueryLoss:
        return "margin"
