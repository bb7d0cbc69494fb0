"""Estimates of the Frobenius norm of Jacobians by random projections, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from gambeson.analysis.inputs import forward, held
from gambeson.analysis.matrix_free import Linearised
from gambeson.base import UserError, generator
from gambeson.base.checks import as_images
from gambeson.victim import Source, Victim

Projection = Literal["output", "input", "finite-differences"]
"""``output``: v^T J, one backward each (Hoffman et al. 2019). ``input``: J u, one backward each and one more.
``finite-differences``: J u from two forwards each, for models without gradients."""


@dataclass(frozen=True)
class Estimate:
    """Unbiased estimates of ||J_i||_F^2. Their roots, the norms, are biased low by Jensen's inequality."""

    values: torch.Tensor
    """(N,): the mean over the projections."""
    errors: torch.Tensor
    """(N,): standard error of each; NaN with one projection."""

    @property
    def mean(self) -> float:
        """Mean of ||J_i||_F^2 over the images; twice the regulariser R."""
        return float(self.values.double().mean())

    @property
    def error(self) -> float:
        """Standard error of ``mean`` over the projections, for fixed images; NaN with one projection."""
        return float(self.errors.double().square().sum().sqrt() / len(self.errors))


def estimate_frobenius(
    model: Source,
    images: torch.Tensor,
    *,
    projections: int = 8,
    method: Projection = "output",
    step: float = 1e-2,
    seed: int = 0,
) -> Estimate:
    """Estimate ||J_i||_F^2 at each image by random projections.

    Output: v uniform on the unit sphere of R^K, one per image; E[K ||v^T J||^2] = ||J||_F^2 (Hoffman et al. 2019). Its
        relative standard deviation is at most sqrt(2 (K-1) / (K+2)). Input: u uniform on the unit sphere of the pixels,
        E[D ||J u||^2] = ||J||_F^2. Finite differences take (f(x + h u) - f(x - h u)) / 2h, which is exact where the
        model is linear within h; the model gets values outside [0, 1] by up to h.

    Cost per image: one forward and ``projections`` backwards, or one backward more; or 2 ``projections`` forwards.

    Args:
        model: a module or a victim.
        images: (N, C, H, W) in [0, 1].
        projections: draws per image; default ours.
        method: projected side, and method.
        step: h of finite differences: an L2 length in pixel units; default ours.
        seed: of the draws, also a random model's.

    Raises:
        UserError: images out of range, no projections, or a model that is not a classifier.
    """
    if projections < 1:
        raise UserError(f"projections = {projections}: expected 1 or more")
    images = as_images(images, floats=True)
    with held(model, seed) as victim:
        draw = generator(seed, "projections", method, device=images.device)
        if method == "output":
            squares = _from_outputs(victim, images, projections, draw)
        elif method == "input":
            squares = _from_inputs(victim, images, projections, draw)
        else:
            squares = _from_differences(victim, images, projections, draw, step)
    spread = squares.double().std(0) if projections > 1 else torch.full_like(squares[0], math.nan)
    return Estimate(squares.mean(0), spread.to(squares.dtype) / projections**0.5)


def _from_outputs(victim: Victim, images: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    point, logits = forward(victim, images)
    squares = []
    for k in range(count):
        row = victim.gradient(logits, point, len(point), _unit(logits, draw), keep=k + 1 < count)
        squares.append(logits.shape[1] * row.flatten(1).square().sum(1))
    return torch.stack(squares)


def _from_inputs(victim: Victim, images: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    line = Linearised(victim, images)
    changes = torch.stack([line.push(_unit(images, draw)) for _ in range(count)])
    return images[0].numel() * changes.square().sum(2)


def _from_differences(
    victim: Victim, images: torch.Tensor, count: int, draw: torch.Generator, step: float
) -> torch.Tensor:
    squares = []
    with torch.no_grad():
        for _ in range(count):
            move = step * _unit(images, draw)
            change = (victim.forward_original(images + move) - victim.forward_original(images - move)) / (2 * step)
            squares.append(images[0].numel() * change.square().sum(1))
    return torch.stack(squares)


def _unit(like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    rows = torch.randn(like.shape, generator=draw, device=like.device, dtype=like.dtype)
    return rows / rows.flatten(1).norm(dim=1).view(-1, *[1] * (rows.ndim - 1))
