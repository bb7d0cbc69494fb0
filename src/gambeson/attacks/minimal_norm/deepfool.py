"""DeepFool: repeated steps to the nearest decision boundary of the linearised model."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.attacks.minimal_norm.base import MinimalNorm, refuse_non_finite
from gambeson.attacks.query.base import InfOr2
from gambeson.attacks.registry import register
from gambeson.attacks.solver import warn_of_zero_gradient
from gambeson.base import Number
from gambeson.tasks import CLASSIFICATION
from gambeson.threat import Ball, Norm
from gambeson.victim import Victim

_SHORTEST = 1e-6
"""Minimum step size in pixel units (ours): on the boundary itself a step of length zero would never leave it."""
_FEW = 4
"""Up to this many images, one backward through copies is faster than a backward per class."""


@register(
    "deepfool",
    source="Moosavi-Dezfooli et al. 2016",
    cost="1 / (classes - 1), per step; up to 4 images: classes / (classes - 1)",
)
class DeepFool(MinimalNorm):
    """DeepFool (Moosavi-Dezfooli et al. 2016, Algorithm 2; section 3.3 for other norms): a small perturbation.

    Each step linearises the model, finds the nearest class boundary in the norm, |f_k| / ||w_k|| in the dual norm,
    and moves just across it. The overshoot is applied at every step, as in the authors' code, not once at the end as in
    the paper's text, so that one step suffices on a linear model. Labels are the truth: pass the model's own
    predictions for the paper's setting. An adversarial image is finished; one without success keeps its last
    perturbation. Untargeted only, as in the paper. Cost per image and step while active: 1 forward and ``classes`` - 1
    backwards; with at most four active images, ``classes`` - 1 more forwards.
    """

    norm: InfOr2 = "2"
    """Norm that is made small."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Number of the likeliest classes considered, including the label (authors' code: 10)."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Maximum number of steps (authors' code: 50)."""
    overshoot: Annotated[Number, Field(ge=0)] = 0.02
    """Overshoot beyond the linearised boundary, as a share of the perturbation."""
    clip: Literal["step", "end"] = "step"
    """When to clip to [0, 1]: at every ``step``, so that other pixels make up for it; or once at the ``end``, as the
    paper, which has no pixel range, would."""

    @property
    def small_in(self) -> Norm:
        """Norm that is made small."""
        return self.norm

    def search(self, victim: Victim, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Move every image of ``rows`` across its boundary; see :class:`MinimalNorm`."""
        found, rivals = x.clone(), None
        for number in range(1, self.steps + 1):
            labels = y[rows]
            with torch.enable_grad():
                point = found[rows].requires_grad_()
                logits = victim(point)
                if rivals is None:
                    rivals = self._rivals(logits.detach(), labels)
                refuse_non_finite(logits, step=number)
                down = CLASSIFICATION.is_adversarial(logits, labels)
                if bool(down.all()):
                    break
                step = self._step(victim, point, logits, labels, rivals, number)
            moved = point.detach() + (1 + self.overshoot) * step
            if self.clip == "step":
                moved = moved.clamp(0, 1)
            found[rows] = torch.where(down.view(-1, 1, 1, 1), found[rows], moved)
            rows, rivals = rows[~down], rivals[~down]
        return found

    def _rivals(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the likeliest classes but the label at the image itself, (A, classes - 1)."""
        count = min(self.classes, logits.shape[1]) - 1
        return logits.scatter(1, labels.unsqueeze(1), -torch.inf).topk(count).indices

    def _step(
        self,
        victim: Victim,
        point: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rivals: torch.Tensor,
        number: int,
    ) -> torch.Tensor:
        """Return the shortest step to a boundary of the linearised model, (A, C, H, W)."""
        nearest, direction = logits.new_full((len(point),), torch.inf), torch.zeros_like(point)
        ball = Ball(eps=1.0, norm=self.norm)
        gaps = logits.gather(1, rivals) - logits.gather(1, labels.unsqueeze(1))
        copied = _copied_gradients(victim, point, labels, rivals) if len(point) <= _FEW else None
        for k in range(rivals.shape[1]):
            if copied is None:
                # The graph is kept until the last class, which saves a forward for each.
                gradient = victim.gradient(gaps[:, k].sum(), point, len(point), keep=k + 1 < rivals.shape[1])
            else:
                gradient = copied[:, k]
            rise = gradient.flatten(1).abs().sum(1) if self.norm == "inf" else gradient.flatten(1).norm(dim=1)
            refuse_non_finite(rise, step=number)
            distance = torch.where(rise > 0, gaps[:, k].detach().abs() / rise, torch.inf)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            direction = torch.where(closer.view(-1, 1, 1, 1), ball.steepest(gradient), direction)
        if not bool(nearest.isfinite().any()):
            warn_of_zero_gradient()
        # Without any gradient there is no step.
        length = torch.where(nearest.isfinite(), nearest.clamp(min=_SHORTEST), 0)
        return direction * length.view(-1, 1, 1, 1)


def _copied_gradients(victim: Victim, point: torch.Tensor, labels: torch.Tensor, rivals: torch.Tensor) -> torch.Tensor:
    """Return the gradients of every rival's lead, (A, k, C, H, W), from one backward through k copies per image."""
    count = rivals.shape[1]
    copies = point.detach().repeat_interleave(count, 0).requires_grad_()
    pairs = torch.stack([rivals.flatten(), labels.repeat_interleave(count)], 1)
    lead = victim(copies).gather(1, pairs)
    return victim.gradient((lead[:, 0] - lead[:, 1]).sum(), copies, len(copies)).unflatten(0, (-1, count))
