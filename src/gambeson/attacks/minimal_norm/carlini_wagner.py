"""The Carlini-Wagner attack: the smallest Euclidean perturbation, by gradient descent in tanh space."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.attacks.losses import margin
from gambeson.attacks.minimal_norm.base import MinimalNorm, refuse_non_finite
from gambeson.attacks.registry import register
from gambeson.attacks.solver import Adam, warn_of_zero_gradient
from gambeson.base import Number
from gambeson.tasks import CLASSIFICATION
from gambeson.victim import Victim

_EDGE = 0.999999
"""Pixels are scaled by this factor before the inverse tanh, which is infinite at 0 and 1 (authors' code)."""


@register("carlini-wagner", source="Carlini and Wagner 2017", cost="searches x steps + 1 / searches x steps")
class CarliniWagner(MinimalNorm):
    """Carlini and Wagner's L2 attack (2017, sections V-A and VI-A): minimise ||delta||^2 + c f(x + delta).

    x + delta = (tanh(w) + 1) / 2 keeps every pixel in [0, 1]; f is the margin to success with confidence ``kappa``; c
    is searched per image, by factors of ten until the first success and then by bisection. The result is the smallest
    success at any step of any c; images without success, and images already misclassified (by ``kappa``), are returned
    unchanged. Success is checked on the returned images themselves. Cost per image: at most 1 + ``searches`` x
    ``steps`` forwards and ``searches`` x ``steps`` backwards.
    """

    targeted: bool = False
    """Read the labels as targets to reach."""
    kappa: Annotated[Number, Field(ge=0)] = 0.0
    """Confidence: the margin, in logits, by which the attack must succeed."""
    searches: Annotated[int, Field(ge=1)] = 9
    """Number of values of c (authors' code: 9)."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Adam steps per value of c. The authors use up to 10,000; 1,000 is ours and ends within one per cent of the
    optimum of a linear model. Black and white pixels need a few hundred steps to leave the flat ends of tanh."""
    lr: Annotated[Number, Field(gt=0)] = 0.01
    """Step size of Adam, in the space of w (authors' code)."""
    c: Annotated[Number, Field(gt=0)] = 1e-3
    """First value of c (authors' code)."""
    judge: Literal["last", "any"] = "last"
    """Which successes decrease c: those in the last tenth of the steps (ours), or any (authors' code). Near a boundary
    the first steps overshoot for every c; ``any`` then decreases c in vain and ends a third above the optimum. Either
    way the smallest success of all steps is returned."""
    early_abort: bool = True
    """Stop a value of c for an image once a tenth of the steps has decreased neither its objective nor the lowest one
    so far by 0.01 per cent. The authors' code compares the batch's sum at the ends of the tenths; a single image
    oscillates about its boundary, and appears constant until its black and white pixels have left the flat ends of
    tanh, so it is not judged during the steps that this takes at the full speed of Adam."""

    def search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Search c and minimise for every image of ``rows``; see :class:`MinimalNorm`."""
        with torch.no_grad():
            logits = victim(x[rows])
        best, shortest = x.clone(), x.new_full((len(x),), torch.inf)
        rows = rows[~self._success(logits, y[rows])]
        lower, upper = torch.zeros_like(shortest), torch.full_like(shortest, torch.inf)
        c = torch.full_like(shortest, self.c)
        for _ in range(self.searches):
            if len(rows) == 0:
                break
            found = self._minimise(victim, x, y, rows, c, best, shortest)
            upper[rows] = torch.where(found, c[rows], upper[rows])
            lower[rows] = torch.where(found, lower[rows], c[rows])
            c = torch.where(upper.isfinite(), (lower + upper) / 2, c * 10)
        return best

    def _minimise(
        self,
        victim: Victim,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: torch.Tensor,
        c: torch.Tensor,
        best: torch.Tensor,
        shortest: torch.Tensor,
    ) -> torch.Tensor:
        """Minimise with one c per image; record successes in ``best`` and ``shortest``; return who had one (A,)."""
        w = torch.atanh((2 * x[rows] - 1) * _EDGE)
        adam = Adam.like(w)
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        flat = w.flatten(1).abs().amax(1) / self.lr
        before = lowest_before = lowest = x.new_full((len(rows),), torch.inf)
        going, tenth = rows, max(1, self.steps // 10)
        for step in range(self.steps):
            images, labels = x[going], y[going]
            with torch.enable_grad():
                point = w.detach().requires_grad_()
                moved = (point.tanh() + 1) / 2
                logits = victim(moved)
                length = (moved - images).square().flatten(1).sum(1)
                short = (self.kappa - self._gain(logits, labels)).clamp(min=0)
                objective = length + c[going] * short
                still = None if step else torch.autograd.grad(length.sum(), point, retain_graph=True)[0]
                gradient = victim.gradient(objective.sum(), point, len(going))
            if still is not None and torch.equal(gradient, still):
                warn_of_zero_gradient()
            refuse_non_finite(gradient.sum(), objective.sum(), step=step + 1)
            success, moved, length = self._success(logits.detach(), labels), moved.detach(), length.detach()
            better = success & (length < shortest[going])
            best[going[better]], shortest[going[better]] = moved[better], length[better]
            if self.judge == "last" and step % tenth == 0:
                reached[going] = False
            reached[going] |= success
            w = point.detach() - self.lr * adam.direction(gradient)
            lowest = lowest.minimum(objective.detach())
            if self.early_abort and (step + 1) % tenth == 0:
                now = objective.detach()
                improving = (now < 0.9999 * before) | (lowest < 0.9999 * lowest_before) | (step < flat)
                flat, before = flat[improving], now[improving]
                lowest_before = lowest = lowest[improving]
                going, w = going[improving], w[improving]
                adam = adam.of(improving)
                if len(going) == 0:
                    break
        return reached[rows]

    def _gain(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Margin of the attack's success, in logits, (N,)."""
        return -margin(logits, labels) if self.targeted else margin(logits, labels)

    def _success(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return CLASSIFICATION.is_adversarial(logits, labels, targeted=self.targeted) & (
            self._gain(logits, labels) >= self.kappa
        )
