"""Gradients that vanish or saturate: numbers that tell a flat model from one that hides its slope."""

from __future__ import annotations

from typing import Any

import torch

from gambeson.analysis.jacobian import Spread
from gambeson.analysis.matrix_free import batches_of
from gambeson.analysis.views import Source, answer, labelled, margins, opened, pull
from gambeson.base import Config, UserError


class GradientStatistics(Config):
    """What the gradients with respect to the pixels look like over a set.

    A model whose loss gradient is zero while its margin's is not saturates (logits too large for the softmax); one
    whose margin gradient is zero as well is cut, rounded or dead.
    """

    images: int
    loss_norm: Spread
    """||grad_x CE||_2 of every image; its mean is the flatness of Tramer et al. 2018, section 4: a small norm
    explains a small rise of the loss, a large one does not."""
    margin_norm: Spread
    """||grad_x (f_y - max of the others)||_2, in logits per pixel unit."""
    loss_zero: float
    """Share of images whose loss gradient is exactly zero in every value."""
    margin_zero: float
    """Share of images whose margin gradient is exactly zero in every value."""
    zero_values: float
    """Share of single values of the margin gradient that are exactly zero; dead corners of the image count too."""
    saturated: float
    """Share of images whose probability of the predicted class is 1 in float32 to the last digit."""
    logit_range: Spread
    """Largest minus smallest logit of every image."""
    rescaled_norm: Spread
    """||grad_x CE(f / s_i)||_2, s_i the standard deviation of the image's logits, held fixed: what the loss gradient
    would be at ordinary logits. Multiplying the logits by a constant does not change it."""
    rescaled_ratio: float | None
    """Mean of ``rescaled_norm`` over that of ``loss_norm``: far above 1 where logits are scaled up until the softmax
    saturates. None where every loss gradient is zero."""

    @property
    def masked_by_scale(self) -> float:
        """Share of images, at the least, whose loss gradient is zero though their margin's is not."""
        return max(0.0, self.loss_zero - self.margin_zero)


def gradient_statistics(model: Source, data: Any) -> GradientStatistics:
    """Measure vanishing and saturated gradients over a set.

    Cost an image: one forward and three backwards (loss, margin, loss of rescaled logits).

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).

    Raises:
        UserError: no classifier, or logits that are not finite.
    """
    split = labelled(data)
    parts = []
    with opened(model) as victim:
        for images, labels in batches_of(victim, split):
            point, logits = answer(victim, images)
            if not bool(logits.isfinite().all()):
                raise UserError("the model gave NaN or infinite logits: its gradients mean nothing; load other weights")
            with torch.enable_grad():
                loss = _cross_entropy(logits, labels.clone())
                margin = margins(logits, labels).sum()
                scale = logits.detach().std(1, keepdim=True)
                rescaled = _cross_entropy(logits / scale.where(scale > 0, 1), labels.clone())
            rows = [
                pull(victim, value, point, keep=k < 2).flatten(1) for k, value in enumerate((loss, margin, rescaled))
            ]
            top, low = logits.detach().amax(1), logits.detach().amin(1)
            sure = logits.detach().softmax(1).amax(1) == 1
            zeros = (rows[1] == 0).float().mean(1)
            norms, alive = [row.norm(dim=1) for row in rows], [row.any(1) for row in rows[:2]]
            parts.append((*norms, *alive, zeros, sure, top - low))
    loss_norm, margin_norm, rescaled_norm, has_loss, has_margin, zeros, sure, reach = (
        torch.cat(column).double() for column in zip(*parts, strict=True)
    )
    mean = float(loss_norm.mean())
    return GradientStatistics(
        images=len(split),
        loss_norm=_spread(loss_norm),
        margin_norm=_spread(margin_norm),
        loss_zero=float(1 - has_loss.mean()),
        margin_zero=float(1 - has_margin.mean()),
        zero_values=float(zeros.mean()),
        saturated=float(sure.mean()),
        logit_range=_spread(reach),
        rescaled_norm=_spread(rescaled_norm),
        rescaled_ratio=float(rescaled_norm.mean()) / mean if mean > 0 else None,
    )


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _spread(values: torch.Tensor) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found
