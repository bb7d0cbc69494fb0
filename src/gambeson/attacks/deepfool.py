"""DeepFool: step after step to the nearest decision boundary of the model's linearisation."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import fallen
from gambeson.attacks.query import InfOr2, attacked, working
from gambeson.base import Config, Number, UserError
from gambeson.base.checks import check_batch, check_labels
from gambeson.threat import Ball, Eps, perturb
from gambeson.victim import Victim

_SHORTEST = 1e-6
"""Shortest step in pixel units (ours): on the boundary itself a step of no length would never leave it."""
_BROKEN = "the model's logits or gradient are NaN or infinite: no attack can follow them; check the model's weights"


class DeepFool(Config):
    """DeepFool (Moosavi-Dezfooli et al. 2016, Algorithm 2; section 3.3 for other norms): a small perturbation.

    Each step linearises the model, finds the nearest class boundary in the norm, |f_k| / ||w_k|| in the dual norm,
    and moves just across it. The overshoot is applied at every step, as in the authors' code, and not once at the
    end as in the paper's text, so that a linear model falls in one step. Labels are the truth: pass the model's own
    predictions for the paper's reading. An image that falls is finished; one that never does keeps its last
    perturbation. Untargeted only, as in the paper.
    Cost an image and step: 1 forward and ``classes`` - 1 backwards, for as long as it stands.
    """

    eps: Eps | None = None
    """Radius in pixel units; what is found beyond it is projected to the ball, and may then succeed no more.
    None: no bound."""
    norm: InfOr2 = "2"
    """Norm that is made small."""
    classes: Annotated[int, Field(ge=2)] = 10
    """How many of the likeliest classes count, the label among them (authors' code: 10)."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Most steps (authors' code: 50)."""
    overshoot: Annotated[Number, Field(gt=0)] = 0.02
    """How far beyond the linearised boundary a step goes, as a share of the perturbation."""
    clip: Literal["step", "end"] = "step"
    """Clip to [0, 1] at every step, so that what the clip takes away is made up for by other pixels; ``end`` is
    the paper's way, which knows no range, with one clip after the last step."""

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
            y: (N,) labels.
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
            return found.clamp(0, 1).to(images.dtype)
        delta = Ball(eps=self.eps, norm=self.norm).project(found - working(images))
        return perturb(images, delta.to(images.dtype))

    def _search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found, rivals = x.clone(), None
        for _ in range(self.steps):
            labels = y[rows]
            with torch.enable_grad():
                point = found[rows].requires_grad_()
                logits = victim(point)
                if rivals is None:
                    rivals = self._rivals(logits.detach(), y, rows)
                if not bool(logits.isfinite().all()):
                    raise UserError(_BROKEN)
                down = fallen(logits, labels)
                if bool(down.all()):
                    break
                step = self._step(victim, point, logits, labels, rivals)
            moved = point.detach() + (1 + self.overshoot) * step
            if self.clip == "step":
                moved = moved.clamp(0, 1)
            found[rows] = torch.where(down.view(-1, 1, 1, 1), found[rows], moved)
            rows, rivals = rows[~down], rivals[~down]
        return found

    def _rivals(self, logits: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the likeliest classes but the label at the image itself, (A, classes - 1)."""
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UserError(
                f"the model answers with shape {tuple(logits.shape)}: expected logits (N, K) with K of at least 2; "
                "for label maps choose a gradient attack such as PGD"
            )
        check_labels(y[rows], logits.shape[1])
        count = min(self.classes, logits.shape[1]) - 1
        return logits.scatter(1, y[rows].unsqueeze(1), -torch.inf).topk(count).indices

    def _step(
        self, victim: Victim, point: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, rivals: torch.Tensor
    ) -> torch.Tensor:
        """Return the shortest step to a boundary of the linearised model, (A, C, H, W)."""
        nearest, direction = logits.new_full((len(point),), torch.inf), torch.zeros_like(point)
        ball = Ball(eps=1.0, norm=self.norm)
        own = logits.gather(1, labels.unsqueeze(1))
        gaps = logits.gather(1, rivals) - own
        for k in range(rivals.shape[1]):
            # One graph serves every class, so it is kept until the last: a forward less for each.
            victim.backwards += len(point)
            (slope,) = torch.autograd.grad(gaps[:, k].sum(), point, retain_graph=k + 1 < rivals.shape[1])
            rise = slope.flatten(1).abs().sum(1) if self.norm == "inf" else slope.flatten(1).norm(dim=1)
            if not bool(rise.isfinite().all()):
                raise UserError(_BROKEN)
            distance = torch.where(rise > 0, gaps[:, k].detach().abs() / rise, torch.inf)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            direction = torch.where(closer.view(-1, 1, 1, 1), ball.steepest(slope), direction)
        # Where no class has a slope there is nowhere to go.
        length = torch.where(nearest.isfinite(), nearest.clamp(min=_SHORTEST), 0)
        return direction * length.view(-1, 1, 1, 1)
