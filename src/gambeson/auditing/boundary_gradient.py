"""Gradients taken where the answer changes: an attack from images of other classes."""

from __future__ import annotations

import torch

from gambeson.attacks import Loss
from gambeson.auditing.nearest_class import nearest_others
from gambeson.data import Split
from gambeson.evaluation.outcome import at_once
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat import Ball, perturb
from gambeson.victim import Victim

_STARTS, _HALVINGS, _ROUNDS = 2, 6, 8
"""Nearest images of other classes to start from, one after the other; halvings of a line, and normals that are followed
from one start (ours)."""
_BEYOND = (1.05, 1.3, 1.8)
"""How far beyond the tangent a point is looked for that is answered wrongly, as factors (ours)."""
_AWAY = 1.2
"""How much farther from the image than the last boundary point it may lie (ours)."""


class BoundaryGradient:
    """Walk along the boundary towards each image, by the gradients on the boundary.

    From an image of another class the line to the attacked image is halved until the place where the answer changes is
    known. The gradient of the margin there is the boundary's normal, however the scores were bent elsewhere: a factor
    on the margin has no say where the margin is zero. The nearest point of the tangent, within the box, is the next
    image to start from. The attack is ours, after DeepFool (Moosavi-Dezfooli et al. 2016, from the other side), Brendel
    et al. (2019) and HopSkipJump (Chen et al. 2020, with the model's gradient).

    Args:
        ball: of allowed perturbations.
        known: images with one label each, from the train split.
    """

    def __init__(self, ball: Ball, known: Split) -> None:
        self.ball, self.known = ball, known

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images.

        Args:
            model: the model, inside its context; asked for scores and gradients.
            x: images (N, C, H, W) in [0, 1].
            y: labels (N,).
            seed: nothing is drawn.
            task: what the labels mean; an image whose label does not count stays.
        """
        images, nearest = nearest_others(self.known, x, y, _STARTS)
        moved = x.clone()
        for part in torch.arange(len(x), device=x.device).split(at_once(self.known)):
            left = part
            for which in nearest.T:
                walk = _Walk(model, self.ball, x[left], y[left], CLASSIFICATION if task is None else task)
                found, fallen = walk.run(images[which[left]])
                moved[left[fallen]] = found[fallen]
                left = left[~fallen]
                if len(left) == 0:
                    break
        return moved


class _Walk:
    """One walk along the boundary for each image of a batch."""

    def __init__(self, model: Victim, ball: Ball, x: torch.Tensor, y: torch.Tensor, task: Task) -> None:
        self.model, self.ball, self.x, self.y, self.task = model, ball, x, y, task
        self.best, self.fallen = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def run(self, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images (N, C, H, W) of the ball that were reached, and which of them (N,) are wrong."""
        at = start
        for _ in range(_ROUNDS):
            at = self._halved(at)
            self._keep(at)
            at = self._beyond_tangent(at)
            self._keep(at)
        return self.best, self.fallen

    @torch.no_grad()
    def _wrong(self, images: torch.Tensor) -> torch.Tensor:
        return self._margins(images) > 0

    def _margins(self, images: torch.Tensor) -> torch.Tensor:
        loss = Loss(kind="margin")
        return loss(self.model.forward_original(images), self.y, self.task)

    def _keep(self, at: torch.Tensor) -> None:
        """Keep what is wrong within the ball."""
        inside = perturb(self.x, self.ball.project(at - self.x))
        new = self._wrong(inside) & ~self.fallen
        self.best[new] = inside[new]
        self.fallen |= new

    def _halved(self, at: torch.Tensor) -> torch.Tensor:
        """Return the point nearest to the image on the line to it that was seen to be wrong."""
        low, high = self.x.new_zeros(len(at)), self.x.new_ones(len(at))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            wrong = self._wrong(self.x + _row(middle, at) * (at - self.x))
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        return self.x + _row(high, at) * (at - self.x)

    def _beyond_tangent(self, at: torch.Tensor) -> torch.Tensor:
        """Return a point a little beyond the tangent at a boundary point, near the image and wrong; else that point."""
        with torch.enable_grad():
            point = at.clone().requires_grad_()
            gradient = self.model.gradient(self._margins(point).sum(), point, len(point)).nan_to_num(0, 0, 0)
        way = gradient.sign() if self.ball.norm == "inf" else gradient / _row(_size(gradient).clamp(min=1e-30), at)
        needed = (gradient * (at - self.x)).flatten(1).sum(1)
        low, high = self.x.new_zeros(len(at)), self.x.new_full((len(at),), 2 * float(_size(at - self.x).max()))
        for _ in range(4 * _HALVINGS):  # pixels end at black and white, so that the length has no closed form
            middle = (low + high) / 2
            there = (gradient * (perturb(self.x, _row(middle, at) * way) - self.x)).flatten(1).sum(1) >= needed
            low, high = torch.where(there, low, middle), torch.where(there, middle, high)
        found, missing = at.clone(), torch.ones_like(self.fallen)
        most = _AWAY * self.ball.length(at - self.x)
        for factor in _BEYOND:
            tried = perturb(self.x, _row(factor * high, at) * way)
            new = missing & (self.ball.length(tried - self.x) <= most) & self._wrong(tried)
            found[new] = tried[new]
            missing &= ~new
        return found


def _row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return one value per image (N,) in the shape that multiplies images."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _size(values: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of each image (N,)."""
    return values.flatten(1).norm(dim=1)
