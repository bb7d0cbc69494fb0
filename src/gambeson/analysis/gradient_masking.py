"""Signs of gradient masking: vanishing and saturated gradients, and loss surfaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gambeson.analysis.inputs import classifier, forward, held, margins
from gambeson.analysis.jacobian import Spread
from gambeson.analysis.matrix_free import batches_of
from gambeson.base import Config, UserError, generator
from gambeson.tasks import CLASSIFICATION, as_pair
from gambeson.threat import Ball, perturb
from gambeson.victim import Source, Victim, predicted


class GradientStatistics(Config):
    """Statistics of the gradients with respect to the pixels over a set.

    A zero loss gradient with a non-zero margin gradient indicates saturation (logits too large for the softmax); a zero
    margin gradient a detached, rounded or dead model.
    """

    images: int
    loss_norm: Spread
    """||grad_x CE||_2 of every image; its mean is the flatness of Tramer et al. 2018, section 4."""
    margin_norm: Spread
    """||grad_x (f_y - max of the others)||_2, in logits per pixel unit."""
    loss_zero: float
    """Share of images whose loss gradient is exactly zero in every value."""
    margin_zero: float
    """Share of images whose margin gradient is exactly zero in every value."""
    zero_values: float
    """Share of single values of the margin gradient that are exactly zero; including dead corners of the image."""
    saturated: float
    """Share of images whose predicted probability is exactly 1 in float32."""
    logit_range: Spread
    """Largest minus smallest logit of every image."""
    rescaled_norm: Spread
    """||grad_x CE(f / s_i)||_2, s_i the detached standard deviation of the image's logits: the loss gradient at
    ordinary logits, invariant to their scale."""
    rescaled_ratio: float | None
    """Mean of ``rescaled_norm`` over that of ``loss_norm``: far above 1 if large logits saturate the softmax. None if
    every loss gradient is zero."""

    @property
    def masked_by_scale(self) -> float:
        """Lower bound of the share of images with zero loss gradient but non-zero margin gradient."""
        return max(0.0, self.loss_zero - self.margin_zero)


def gradient_statistics(model: Source, data: Any) -> GradientStatistics:
    """Measure vanishing and saturated gradients over a set.

    Cost per image: one forward and three backwards (loss, margin, loss of rescaled logits).

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).

    Raises:
        UserError: the model is not a classifier, or its logits are not finite.
    """
    parts = []
    with classifier(model, data) as (victim, split):
        for images, labels in batches_of(victim, split):
            point, logits = forward(victim, images)
            with torch.enable_grad():
                loss = _cross_entropy(logits, labels.clone())
                margin = margins(logits, labels).sum()
                scale = logits.detach().std(1, keepdim=True)
                rescaled = _cross_entropy(logits / scale.where(scale > 0, 1), labels.clone())
            rows = [
                victim.gradient(value, point, len(point), keep=k < 2).flatten(1)
                for k, value in enumerate((loss, margin, rescaled))
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


@dataclass(frozen=True)
class Surface:
    """Cross-entropy on a square grid of x + e1 g + e2 g_perp, for each image."""

    steps: torch.Tensor
    """(S,): the values of e1 and of e2, in pixel units, from -extent to extent; the middle one is 0."""
    loss: torch.Tensor
    """(N, S, S): [image, e1, e2]."""
    wrong: torch.Tensor
    """(N, S, S) bool: the prediction differs from the label."""
    gradient: torch.Tensor
    """(N, C, H, W): g, the sign of the model's own loss gradient."""
    orthogonal: torch.Tensor
    """(N, C, H, W): g_perp, also signs (except for a zero or two), with <g, g_perp> = 0 for every image."""

    @property
    def ridge(self) -> torch.Tensor:
        """(N,): decrease of the loss along g from its maximum to the far end; 0 if it only increases.

        A ridge at small e1 is typical of single-step adversarial training (Tramer et al. 2018, Figure 1).
        """
        middle = len(self.steps) // 2
        along = self.loss[:, middle:, middle]
        return along.amax(1) - along[:, -1]


def loss_surface(
    model: Source,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    extent: float | str = 8 / 255,
    points: int = 21,
    other: Source | None = None,
    clip: bool = False,
    seed: int = 0,
) -> Surface:
    """Compute the loss on x + e1 g + e2 g_perp (Tramer et al. 2018, section 4.1 and Figure 1).

    g is the signed loss gradient of the model, g_perp the signed gradient of another model, or a random vector, made
    orthogonal to g. It is the sign vector orthogonal to g along which the other gradient is largest (ours: the paper's
    orthogonalisation is not known to us).

    Cost per image: ``points``^2 + 1 forwards and one backward; one more of each for the other model.

    Args:
        model: a module or a victim.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        extent: the largest |e1| and |e2|, in pixel units; default ours.
        points: grid points per side, odd, so that the image itself is one; default ours.
        other: the model whose gradient defines g_perp; None: random.
        clip: clip to [0, 1]. The paper's surface is not clipped, which keeps it smooth but uses values outside the
            pixel range.
        seed: of the random direction, and of random models' draws.

    Raises:
        UserError: points even or below 3, extent not above 0, or images and labels that do not fit.
    """
    if points < 3 or points % 2 == 0:
        raise UserError(f"points = {points}: expected an odd number of 3 or more, so that the image is in the middle")
    reach = Ball(eps=extent).eps
    if reach == 0:
        raise UserError(f"extent = {extent}: expected a length above 0 in pixel units, such as 8/255")
    images, labels, _ = as_pair(images, labels, CLASSIFICATION, floats=True)
    with held(model, seed) as victim:
        g = loss_gradient(victim, images, labels)[0].sign()
        if other is None:
            draw = generator(seed, "surface", device=images.device)
            guide = torch.randn(images.shape, generator=draw, device=images.device, dtype=images.dtype)
        else:
            with held(other, seed) as source:
                guide = loss_gradient(source, images, labels)[0]
        side = orthogonal_signs(g, guide)
        steps = torch.linspace(-1, 1, points, dtype=torch.float64) * reach
        steps[points // 2] = 0
        losses, wrongs = [], []
        with torch.no_grad():
            for first in steps.tolist():
                for second in steps.tolist():
                    move = first * g + second * side
                    logits = victim.forward_original(perturb(images, move) if clip else images + move)
                    losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
                    wrongs.append(predicted(logits) != labels)
    shape = (len(images), points, points)
    return Surface(steps, torch.stack(losses, 1).view(shape), torch.stack(wrongs, 1).view(shape), g, side)


def loss_gradient(victim: Victim, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of each image's cross-entropy, (N, C, H, W), and its margin (N,); one backward each."""
    point, logits = forward(victim, images)
    margin = margins(logits.detach(), labels)
    with torch.enable_grad():
        value = torch.nn.functional.cross_entropy(logits, labels.clone(), reduction="sum")
    return victim.gradient(value, point, len(point)), margin


def orthogonal_signs(g: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Return signs s with <g, s> = 0 that maximise <guide, s>, for each row.

    s starts as the guide's signs. If they agree with g more often than not, those with the smallest guide are flipped
    until the two balance, or vice versa. If the number of values with g != 0 is odd, one value of s is zero.

    Args:
        g: (N, C, H, W) with values -1, 0 and 1.
        guide: the same shape.
    """
    signs = torch.where(guide >= 0, 1.0, -1.0).to(g.dtype).flatten(1)
    product = signs * g.flatten(1)
    surplus = product.sum(1, keepdim=True)
    majority = product * surplus.sign() > 0
    size = guide.flatten(1).abs().masked_fill(~majority, torch.inf)
    rank = size.argsort(dim=1, stable=True).argsort(dim=1)
    flips = (surplus.abs() / 2).floor()
    odd = surplus.abs() % 2 == 1
    signs = torch.where(majority & (rank < flips), -signs, signs)
    signs = signs.masked_fill(majority & odd & (rank == flips), 0)
    return signs.view_as(g)
