"""Carlini and Wagner's attack: the smallest Euclidean perturbation, by gradient descent under the tanh."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.adam import Adam
from gambeson.attacks.losses import fallen, margin
from gambeson.attacks.query import attacked, working
from gambeson.base import Config, Number, UserError
from gambeson.base.checks import check_batch, check_labels
from gambeson.threat import Ball, Eps, perturb
from gambeson.victim import Victim

_EDGE = 0.999999
"""Pixels are drawn in by this factor before the inverse of tanh, as in the authors' code: it is infinite at 0 and 1."""


class CarliniWagner(Config):
    """Carlini and Wagner's L2 attack (2017, sections V-A and VI-A): minimise ||delta||^2 + c f(x + delta).

    x + delta = (tanh(w) + 1) / 2 holds every pixel in [0, 1]; f is the margin left until success with ``kappa`` to
    spare; c is searched for each image by itself, by factors of ten until it succeeds and by halving after. What is
    returned is the smallest success at any step of any c; an image for which there is none comes back as it was,
    and one that the model gets wrong already (by ``kappa``) too. Success is seen on the very images returned.
    Cost an image: at most 1 + ``searches`` x ``steps`` forwards and ``searches`` x ``steps`` backwards.
    """

    eps: Eps | None = None
    """Euclidean radius in pixel units; what is found beyond it is projected to the ball, and may then succeed no
    more. None: no bound."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    kappa: Annotated[Number, Field(ge=0)] = 0.0
    """Confidence: the margin, in logits, by which the attack must succeed."""
    searches: Annotated[int, Field(ge=1)] = 9
    """Values of c tried (authors' code: 9)."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Steps of Adam a value of c. The authors take up to 10,000; 1,000 is ours and ends within one per cent of the
    optimum of a linear model. A black or white pixel needs some hundreds to leave the flat end of tanh."""
    lr: Annotated[Number, Field(gt=0)] = 0.01
    """Step size of Adam, in the space of w (authors' code)."""
    c: Annotated[Number, Field(gt=0)] = 1e-3
    """First value of c (authors' code)."""
    judge: Literal["last", "any"] = "last"
    """Which successes make the search go on with a smaller c: those in the last tenth of the steps (ours), or any
    (authors' code). The first steps overshoot near a boundary whatever c is; ``any`` then halves c in vain, and ends
    a third above the optimum. Either way the smallest success of all steps is returned."""
    early_abort: bool = True
    """Leave a value of c for an image once a tenth of the steps has not lowered its objective by 0.01 per cent
    (authors' code, which judges the batch as a whole; here each image by itself)."""

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
            model: any module from pixels to logits (N, K), or a :class:`Victim` already entered.
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels, or targets where ``targeted``.
            seed: not used; nothing is drawn.
            ignore_index: label of images that are left alone.

        Raises:
            UserError: images outside [0, 1], one label a pixel, or a gradient that is not finite.
        """
        if not isinstance(model, Victim):
            with Victim(model) as victim:
                return self(victim, x, y, seed=seed, ignore_index=ignore_index)
        images = check_batch(x, y)
        rows = attacked(y, ignore_index)
        if len(rows) == 0 or self.eps == 0:
            return images
        found = self._search(model, working(images), y, rows)
        if self.eps is None:
            return found.to(images.dtype)
        delta = Ball(eps=self.eps, norm="2").project(found - working(images))
        return perturb(images, delta.to(images.dtype))

    def _search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = victim(x[rows])
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UserError(
                f"the model answers with shape {tuple(logits.shape)}: expected logits (N, K) with K of at least 2; "
                "for label maps choose a gradient attack such as PGD"
            )
        check_labels(y[rows], logits.shape[1])
        best, shortest = x.clone(), x.new_full((len(x),), torch.inf)
        rows = rows[~self._success(logits, y[rows])]
        lower, upper = torch.zeros_like(shortest), torch.full_like(shortest, torch.inf)
        c = torch.full_like(shortest, self.c)
        for _ in range(self.searches):
            if len(rows) == 0:
                break
            found = self._descend(victim, x, y, rows, c, best, shortest)
            upper[rows] = torch.where(found, c[rows], upper[rows])
            lower[rows] = torch.where(found, lower[rows], c[rows])
            c = torch.where(upper.isfinite(), (lower + upper) / 2, c * 10)
        return best

    def _descend(
        self,
        victim: Victim,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: torch.Tensor,
        c: torch.Tensor,
        best: torch.Tensor,
        shortest: torch.Tensor,
    ) -> torch.Tensor:
        """Descend with one c an image; note successes in ``best`` and ``shortest``; return who had one (A,)."""
        w = torch.atanh((2 * x[rows] - 1) * _EDGE)
        adam = Adam.like(w)
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        before, going, tenth = x.new_full((len(rows),), torch.inf), rows, max(1, self.steps // 10)
        for step in range(self.steps):
            images, labels = x[going], y[going]
            with torch.enable_grad():
                point = w.detach().requires_grad_()
                moved = (point.tanh() + 1) / 2
                logits = victim(moved)
                length = (moved - images).square().flatten(1).sum(1)
                short = (self.kappa - self._gain(logits, labels)).clamp(min=0)
                objective = length + c[going] * short
                gradient = victim.gradient(objective.sum(), point, len(going))
            if not bool(torch.isfinite(gradient.sum() + objective.detach().sum())):
                raise UserError(
                    f"the model's logits or gradient are NaN or infinite at step {step}: no attack can follow them; "
                    "check the model's weights and outputs"
                )
            success, moved, length = self._success(logits.detach(), labels), moved.detach(), length.detach()
            better = success & (length < shortest[going])
            best[going[better]], shortest[going[better]] = moved[better], length[better]
            if self.judge == "last" and step % tenth == 0:
                reached[going] = False
            reached[going] |= success
            w = point.detach() - self.lr * adam.direction(gradient)
            if self.early_abort and (step + 1) % tenth == 0:
                improving = objective.detach() < 0.9999 * before
                before, going, w = objective.detach()[improving], going[improving], w[improving]
                adam = adam.of(improving)
                if len(going) == 0:
                    break
        return reached[rows]

    def _gain(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """By how much the attack has succeeded, in logits, (N,)."""
        return -margin(logits, labels) if self.targeted else margin(logits, labels)

    def _success(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fallen(logits, labels, targeted=self.targeted) & (self._gain(logits, labels) >= self.kappa)
