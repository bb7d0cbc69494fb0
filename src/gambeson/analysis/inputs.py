"""Inputs of the analysis: models as victims, labelled splits, and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gambeson.base import UserError, seeded, twice_differentiable
from gambeson.data import Split, as_split
from gambeson.tasks import CLASSIFICATION
from gambeson.victim import Source, Victim, as_victim


def forward(victim: Victim, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images as a leaf of a graph, and the model's logits (N, K).

    Works under ``torch.no_grad`` and in inference mode as well.

    Raises:
        UserError: the model does not return one row of finite logits per image.
    """
    with torch.enable_grad(), twice_differentiable(victim.model):
        point = images.detach().clone().requires_grad_()
        logits = victim.forward_original(point).to(images.dtype)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] == 0:
        raise UserError(
            f"the model answers with shape {tuple(logits.shape)} for {len(images)} images: Jacobians are taken of "
            "classifiers, expected logits (N, K)"
        )
    if not bool(logits.isfinite().all()):
        raise UserError("the model gave NaN or infinite logits: no gradient is meaningful; load other weights")
    return point, logits


@contextmanager
def held(model: Source, seed: int = 0) -> Iterator[Victim]:
    """Hold a model as a victim: a random one draws the same in every call, and nothing from the caller's generators."""
    with as_victim(model) as victim, seeded(seed, "analysis"):
        yield victim


@contextmanager
def classifier(model: Source, data: Any, seed: int = 0) -> Iterator[tuple[Victim, Split]]:
    """Hold a classifier as :func:`held` does, with ``data`` as a split of images with one label each.

    Of a Dataset, its test split.

    Raises:
        UserError: no data, label maps, or a model that does not return logits of these classes.
    """
    split = labelled(data)
    with held(model, seed) as victim:
        split.check_logits(victim.inspect(split.take(slice(0, 8), victim.device)[0]).shape)
        yield victim, split


def labelled(data: Any) -> Split:
    """Return ``data`` as a split of images with one label each; of a Dataset, the test split.

    Raises:
        UserError: no data, or label maps.
    """
    split = as_split(data)
    if len(split) == 0:
        raise UserError(f"{split.name} holds no images: give at least one")
    split.task.require_classification("a Jacobian's margin")
    if not split.task.labels_every_image:
        raise UserError(f"{split.name} has an ignore index: Jacobians need images that all have a label")
    return split


def margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return f_y minus the largest other logit (N,), not positive for misclassified images.

    Raises:
        UserError: a label without a logit, or a single logit.
    """
    if logits.shape[1] < 2:
        raise UserError("the model has one logit: a margin needs two classes or more")
    CLASSIFICATION.check_labels(labels, logits.shape[1])
    own = logits.gather(1, labels[:, None])
    return (own - logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)).flatten()
