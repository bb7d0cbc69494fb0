"""Exact Jacobians of the logits with respect to the pixels, and their norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gambeson.analysis.inputs import classifier, forward, held, margins
from gambeson.base import Config
from gambeson.base.checks import as_images
from gambeson.data import Split
from gambeson.victim import Source, Victim

_ROWS_BYTES = 2**26
"""Maximum size of the Jacobians of a batch: 2,200 rows of 3 x 32 x 32; a batch has at most 256 images."""


def batch_jacobian(model: Source, images: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian of the logits at every image, (N, K, C*H*W), in logits per pixel unit.

    Exact, by K backward passes of the batch on the model itself, in evaluation mode. The Jacobian is that of the
    logits; that of the softmax vanishes on confident inputs and would reward gradient masking. Cost: one forward and K
    backwards per image; memory N*K*C*H*W floats.

    Args:
        model: a module or a victim.
        images: (N, C, H, W) in [0, 1].

    Raises:
        UserError: images out of range, or a model that is not a classifier.
    """
    with held(model) as victim:
        return rows_at(victim, as_images(images, floats=True))[0]


def rows_at(victim: Victim, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the Jacobians (N, K, C*H*W) and the logits (N, K) of checked images."""
    point, logits = forward(victim, images)
    classes, step = logits.shape[1], _rows_at_once(point)
    found = torch.empty(len(images), classes, point[0].numel(), dtype=point.dtype, device=point.device)
    units = torch.eye(classes, dtype=logits.dtype, device=logits.device)[:, None].expand(-1, len(images), -1)
    for some in torch.arange(classes).split(step):
        first, count, keep = int(some[0]), len(some), int(some[-1]) + 1 < classes
        if count > 1:
            try:
                rows = victim.gradient(logits, point, 0, units[first : first + count], keep=True, batched=True)
                victim.count_backward(count * len(point))
                found[:, first : first + count] = rows.flatten(2).transpose(0, 1)
                continue
            except RuntimeError:  # an operation of the model whose backward cannot be batched
                pass
        for k in some.tolist():
            found[:, k] = victim.gradient(logits, point, len(point), units[k], keep=keep or k < int(some[-1])).flatten(
                1
            )
    return found, logits.detach()


_BACKWARD = 1024
"""Images of one backward on an accelerator, on which a few large kernels take less time than many small ones."""


def _rows_at_once(point: torch.Tensor) -> int:
    """Return how many rows of the Jacobians of a batch share a backward; on a CPU that saves nothing."""
    return 1 if point.device.type == "cpu" else max(1, _BACKWARD // len(point))


def frobenius(jacobian: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm of each Jacobian (N, K, D), shape (N,)."""
    return jacobian.flatten(1).norm(dim=1)


def spectral(jacobian: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value of each Jacobian (N, K, D), shape (N,): the root of the K x K Gram's top."""
    small = jacobian if jacobian.shape[1] <= jacobian.shape[2] else jacobian.transpose(1, 2)
    gram = (small @ small.transpose(1, 2)).double()
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt().to(jacobian.dtype)


@dataclass(frozen=True)
class Rows:
    """The Jacobians of a batch, and its margins."""

    jacobian: torch.Tensor
    """(B, K, D)."""
    margin: torch.Tensor
    """(B,): f_y minus the largest other logit; not positive where the model is wrong."""


def classes_of(victim: Victim, split: Split) -> int:
    """Return the number of logits, from one forward of one image."""
    images, _ = split.take(slice(0, 1), victim.device)
    return forward(victim, images)[1].shape[1]


def walk(victim: Victim, split: Split, *, needs_margin: bool = True) -> Iterator[Rows]:
    """Iterate over a split in batches whose Jacobians need little memory."""
    width = torch.Size(split.shape).numel()
    size = max(1, min(256, _ROWS_BYTES // (4 * width * classes_of(victim, split))))
    for images, labels in split.batches(size, device=victim.device):
        jacobian, logits = rows_at(victim, images)
        yield Rows(jacobian, margins(logits, labels) if needs_margin else logits.new_full((len(labels),), torch.nan))


class Spread(Config):
    """Summary of a per-image quantity over a set."""

    mean: float
    low: float
    """5 % quantile."""
    median: float
    high: float
    """95 % quantile."""
    n: int
    """Number of images."""

    @classmethod
    def of(cls, values: torch.Tensor) -> Spread | None:
        """Summarise values (N,); None if there are none."""
        if len(values) == 0:
            return None
        values = values.double().cpu()
        marks = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        return cls(mean=float(values.mean()), low=marks[0], median=marks[1], high=marks[2], n=len(values))


class JacobianNorms(Config):
    """Norms of the Jacobians of a set."""

    frobenius: Spread
    """||J_i||_F."""
    spectral: Spread
    """||J_i||_2, the largest singular value."""
    reach: Spread | None
    """m_i / (sqrt(2) ||J_i||_2) of correctly classified images: no shorter L2 perturbation can flip the linearised
    model at this image (P4). None if there are none."""
    regulariser: float
    """Half the mean of ||J_i||_F^2: the term R of Jacobian regularisation in pixel space."""
    errors: int
    """Misclassified images, left out of ``reach``."""


def jacobian_norms(model: Source, data: Any) -> JacobianNorms:
    """Measure the exact Jacobian norms of every image of a set.

    Cost: one forward and K backwards per image.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
    """
    with classifier(model, data) as (victim, split):
        parts = [(frobenius(r.jacobian), spectral(r.jacobian), r.margin) for r in walk(victim, split)]
    size, top, margin = (torch.cat(column) for column in zip(*parts, strict=True))
    right = (margin > 0) & (top > 0)
    whole, peak = Spread.of(size), Spread.of(top)
    assert whole is not None
    assert peak is not None
    return JacobianNorms(
        frobenius=whole,
        spectral=peak,
        reach=Spread.of(margin[right] / (2**0.5 * top[right])),
        regulariser=float(size.double().square().mean() / 2),
        errors=int((margin <= 0).sum()),
    )
