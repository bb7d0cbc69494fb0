"""The stacked Jacobian of a set: what one perturbation shared by all its images can do to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from gambeson.analysis.jacobian import frobenius, spectral, walk
from gambeson.analysis.krylov import top_eigenpairs
from gambeson.analysis.matrix_free import EXTRA, build, products_are_cheaper
from gambeson.analysis.spectrum import Spectrum, Weighting, weights
from gambeson.analysis.views import Source, labelled, opened
from gambeson.base import UserError
from gambeson.data import Split
from gambeson.victim import Victim

LARGEST = 4096
"""Pixel values an image for which the whole Gram matrix is kept: 128 MiB in float64."""
_PANEL = 768


@dataclass(frozen=True)
class StackedGram:
    """G itself, with the norms of the single Jacobians that went into it."""

    matrix: torch.Tensor
    """(D, D) float64, D = C*H*W."""
    frobenius: torch.Tensor
    """(M,): ||J_i||_F of the M images of the stack, weighted."""
    spectral: torch.Tensor
    """(M,): ||J_i||_2, weighted."""
    shape: tuple[int, int, int]
    images: int
    left_out: int
    weighting: Weighting

    @property
    def trace(self) -> float:
        """The sum of ||J_i||_F^2 over the stack, exact."""
        return float(self.matrix.diagonal().sum())

    def top(self, count: int = 1, seed: int = 0) -> Spectrum:
        """Return the ``count`` largest eigenpairs, to 1e-8 of the largest."""
        size = len(self.matrix)
        found = top_eigenpairs(lambda v: self.matrix @ v, size, min(count, size), seed=seed, device=self.matrix.device)
        single = float(self.spectral.double().square().sum())
        return Spectrum(
            values=found.values,
            residuals=found.residuals,
            directions=found.vectors.T.float().reshape(-1, *self.shape),
            trace=self.trace,
            trace_error=0.0,
            shared=float(found.values[0]) / single if single > 0 else None,
            images=self.images,
            left_out=self.left_out,
            weighting=self.weighting,
            method="gram",
        )


def stacked_gram(model: Source, data: Any, *, weighting: Weighting = "none") -> StackedGram:
    """Compute G = sum_i J_i^T J_i over a set in one pass (notes on Jacobian regularisation, section 2).

    Products of a batch are taken in float32, which keeps 6 digits, and summed over the batches in float64.

    Cost: one forward and K backwards an image, and about N*K*D^2 / 2 multiplications; memory 12 D^2 bytes beside
    one batch.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        weighting: ``margin`` for the stack of P4.

    Raises:
        UserError: images of more than 4096 values; or no image left to weigh.
    """
    with opened(model) as victim:
        return stacked_grams(victim, labelled(data), (weighting,))[0]


def stacked_grams(victim: Victim, split: Split, weightings: tuple[Weighting, ...]) -> list[StackedGram]:
    """Compute several Gram matrices from one walk over the Jacobians, as :func:`stacked_gram` does one."""
    size = torch.Size(split.shape).numel()
    if size > LARGEST:
        raise UserError(
            f"an image has {size} values, and its Gram matrix {size}^2: expected {LARGEST} or less; "
            "use stacked_spectrum, which needs no matrix"
        )
    sums = [torch.zeros(size, size, dtype=torch.float64, device=victim.device) for _ in weightings]
    norms: list[list[torch.Tensor]] = [[] for _ in weightings]
    for rows in walk(victim, split):
        plain = torch.stack([frobenius(rows.jacobian), spectral(rows.jacobian)], 1)
        # Plain stacks first: the weighted one then divides the same rows in place, and needs no copy of them.
        for k in sorted(range(len(weightings)), key=lambda k: weightings[k] == "margin"):
            weight = weights(rows.margin, weightings[k])
            norms[k].append((plain * weight[:, None])[weight > 0])
            if weightings[k] == "margin":
                rows.jacobian.mul_(weight[:, None, None])
            _add_product(sums[k], rows.jacobian.flatten(0, 1))
    found = []
    for total, parts, weighting in zip(sums, norms, weightings, strict=True):
        total.copy_(total.triu() + total.triu(1).T)
        each = torch.cat(parts)
        left_out = len(split) - len(each) if weighting == "margin" else 0
        found.append(StackedGram(total, each[:, 0], each[:, 1], split.shape, len(split), left_out, weighting))
    return found


def _add_product(total: torch.Tensor, rows: torch.Tensor) -> None:
    # The upper triangle only, panel by panel: torch has no product that knows its result is symmetric.
    for at in range(0, len(total), _PANEL):
        total[at : at + _PANEL, at:] += rows[:, at : at + _PANEL].T @ rows[:, at:]


def stacked_spectrum(
    model: Source,
    data: Any,
    *,
    count: int = 1,
    weighting: Weighting = "none",
    method: Literal["auto", "gram", "rows", "products"] = "auto",
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Spectrum:
    """Find the top of the stacked Jacobian's spectrum for images of any size.

    ``gram``: from G itself (:func:`stacked_gram`), exact, images of up to 4096 values. Without the matrix, by block
    Lanczos on v -> sum_i J_i^T J_i v: ``rows`` computes every J_i, K backwards an image, once if all fit in 512 MiB
    and else once a pass; ``products`` computes J_i v and J_i^T u alone, about three backwards an image, pass and
    direction, for models of many classes. ``auto`` takes the cheapest.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        count: directions wanted.
        weighting: ``margin`` for the stack of P4.
        method: see above.
        tolerance: without the matrix: stop when ||G v - value v|| is this share of the largest value. The value is
            then off by the square of that share, over its relative gap to the next. Default ours.
        seed: of the start, and of the random projections that ``products`` estimates the trace with.

    Raises:
        UserError: ``count`` below 1, or ``gram`` for larger images.
    """
    if count < 1:
        raise UserError(f"count = {count}: expected 1 direction or more")
    split = labelled(data)
    if method == "auto" and torch.Size(split.shape).numel() <= LARGEST:
        method = "gram"
    with opened(model) as victim:
        if method == "gram":
            return stacked_grams(victim, split, (weighting,))[0].top(count, seed)
        if method == "auto":
            method = "products" if products_are_cheaper(victim, split, count) else "rows"
        stack = build(victim, split, lambda margin: weights(margin, weighting), method, seed)
        size = torch.Size(split.shape).numel()
        found = top_eigenpairs(
            stack.apply,
            size,
            min(count, size),
            block=count + EXTRA,
            tolerance=tolerance,
            seed=seed,
            device=victim.device,
        )
    return Spectrum(
        values=found.values,
        residuals=found.residuals,
        directions=found.vectors.T.float().reshape(-1, *split.shape),
        trace=stack.trace,
        trace_error=stack.trace_error,
        shared=float(found.values[0]) / stack.single if stack.single else None,
        images=len(split),
        left_out=stack.left_out,
        weighting=weighting,
        method=method,
    )
