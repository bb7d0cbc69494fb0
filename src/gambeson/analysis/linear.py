"""What a model would do if it were linear around each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gambeson.analysis.matrix_free import Linearised, batches_of
from gambeson.analysis.views import Source, labelled, margins, opened
from gambeson.threat import perturb
from gambeson.victim import predicted


@dataclass(frozen=True)
class Linear:
    """The first-order change of every image's logits under R shared perturbations, beside the truth."""

    logits: torch.Tensor
    """(N, K), clean."""
    margin: torch.Tensor
    """(N,): f_y minus the largest other logit; not positive where the model is wrong already."""
    change: torch.Tensor
    """(R, N, K): J_i delta_r."""
    errors: list[int]
    """(R): images that the linearised model f(x_i) + J_i delta_r gets wrong."""
    measured_errors: list[int]
    """(R): images that the model itself gets wrong at clip(x_i + delta_r)."""
    rest: torch.Tensor
    """(R, N): ||f(x_i + delta_r) - f(x_i) - J_i delta_r||_2 at the clipped image, the linearisation error."""


def linearise(model: Source, data: Any, perturbations: torch.Tensor) -> Linear:
    """Push shared perturbations through the linearised model and through the model itself.

    Cost an image: 1 + R forwards and 1 + R backwards.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        perturbations: (R, C, H, W), in pixel units.
    """
    split = labelled(data)
    parts: list[tuple[torch.Tensor, ...]] = []
    with opened(model) as victim:
        deltas = perturbations.to(victim.device)
        for images, labels in batches_of(victim, split):
            line = Linearised(victim, images)
            change = torch.stack([line.push(delta[None]) for delta in deltas])
            with torch.no_grad():
                truth = torch.stack([victim.exact(perturb(images, delta[None])) for delta in deltas])
            moved = line.logits + change
            parts.append(
                (
                    line.logits,
                    margins(line.logits, labels),
                    change.transpose(0, 1),
                    (moved.argmax(2) != labels).T,
                    (torch.stack([predicted(logits) for logits in truth]) != labels).T,
                    (truth - moved).norm(dim=2).T,
                )
            )
    logits, margin, change, wrong, truly, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Linear(logits, margin, change.transpose(0, 1), wrong.sum(0).tolist(), truly.sum(0).tolist(), rest.T)
