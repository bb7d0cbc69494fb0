"""Steps towards images of other classes: an attack without gradients."""

from __future__ import annotations

import torch

from gambeson.attacks import Loss
from gambeson.data import Split
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat import Ball, perturb
from gambeson.victim import Victim

_TRIES = 20
"""Nearest images, and queries per image (ours)."""


def nearest_others(known: Split, x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of a split (K, C, H, W), and the indices (N, count) of those of other classes nearest to each.

    Args:
        known: images with one label each.
        x: images (N, C, H, W).
        y: labels (N,).
        count: number of images, at most.
    """
    images, labels = known.take(slice(None), x.device)
    distances = torch.cdist(x.flatten(1), images.flatten(1))
    distances[y[:, None] == labels] = torch.inf
    return images, distances.argsort(1)[:, :count]


class NearestClass:
    """Move each image as far as the ball allows towards each of the nearest images of other classes.

    The move with the largest loss is kept. Models that compare images with stored ones (nearest neighbours, prototypes,
    projections onto the data) change their prediction along such lines, and rarely along their gradient. The attack is
    ours.

    Args:
        ball: of allowed perturbations.
        known: images with one label each, from the train split.
    """

    def __init__(self, ball: Ball, known: Split) -> None:
        self.ball, self.known = ball, known

    @torch.no_grad()
    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images.

        Args:
            model: the model, inside its context; asked for scores.
            x: images (N, C, H, W) in [0, 1].
            y: labels (N,).
            seed: nothing is drawn.
            task: what the labels mean; the loss of an image whose label does not count is zero, so that it stays.
        """
        images, order = nearest_others(self.known, x, y, _TRIES)
        loss, kept = Loss(kind="margin"), x.clone()
        best = torch.full((len(x),), -torch.inf, device=x.device)
        for nearest in order.T:
            moved = perturb(x, self.ball.project(images[nearest] - x))
            value = loss(model.forward_original(moved), y, CLASSIFICATION if task is None else task)
            better = value > best
            kept[better], best = moved[better], torch.maximum(value, best)
        return kept
