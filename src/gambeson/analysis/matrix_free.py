"""Matrix-free eigenpairs of the stacked Jacobian's Gram matrix, by block Lanczos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gambeson.analysis.inputs import forward, margins
from gambeson.analysis.jacobian import Rows, classes_of, frobenius, spectral, walk
from gambeson.base import generator
from gambeson.data import Split
from gambeson.victim import Victim

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs, largest first."""

    values: torch.Tensor
    """(k,) float64."""
    vectors: torch.Tensor
    """(D, k) float64, orthonormal."""
    residuals: torch.Tensor
    """(k,): ||A v - value v||; an eigenvalue of A lies at most this far from each value."""


def top_eigenpairs(
    apply: Apply,
    size: int,
    count: int = 1,
    *,
    block: int | None = None,
    tolerance: float = 1e-8,
    max_passes: int = 60,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Eigenpairs:
    """Find the largest eigenvalues of a positive semidefinite matrix by block Lanczos.

    Every product is kept, and each new block is made orthogonal to all before, so that no eigenvalue appears twice and
    the values never decrease; it needs about the square root of the steps of power iteration (Golub and Van Loan,
    section 10.3.6; randomised block start: Musco and Musco 2015). A product with a block costs one pass over a data
    set's Jacobians: at equal accuracy this takes 6 to 9 passes where SciPy's ``lobpcg`` takes 10 to 26 and ``eigsh``,
    which multiplies single vectors, 21 to 32 (LeNet, MNIST digits, 1 to 5 pairs); and blocks stay on the device.

    Args:
        apply: (D, b) float64 to (D, b): the matrix times a block.
        size: D.
        count: number of eigenpairs.
        block: columns per product; by default ``count`` + 3.
        tolerance: stop when every residual is at most this share of the largest value.
        max_passes: stop after so many products; memory grows by 16 D ``block`` bytes per product.
        seed: of the start.
        device: where the blocks are.
    """
    block = min(size, block or count + 3)
    draw = generator(seed, "lanczos", device=device)
    start = torch.randn(size, block, generator=draw, device=device, dtype=torch.float64)
    new = torch.linalg.qr(start).Q
    basis, images = new[:, :0], new[:, :0]
    for _ in range(max(1, max_passes)):
        basis, images = torch.cat([basis, new], 1), torch.cat([images, apply(new)], 1)
        small = basis.T @ images
        values, mix = torch.linalg.eigh((small + small.T) / 2)
        keep = min(count, len(values))
        values, mix = values.flip(0)[:keep], mix.flip(1)[:, :keep]
        vectors = basis @ mix
        residuals = (images @ mix - vectors * values).norm(dim=0)
        room = size - basis.shape[1]
        if room == 0 or float(residuals.max()) <= tolerance * max(float(values[0]), 1e-300):
            break
        new = _orthogonal(images[:, -new.shape[1] :], basis)[:, :room]
    return Eigenpairs(values, vectors, residuals)


def _orthogonal(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal block that is orthogonal to the basis.

    Repeated three times: if the rank of the matrix is exhausted, the first remainder is rounding noise, which must be
    normalised and orthogonalised again.
    """
    for _ in range(3):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Maps margins (B,) to the weights of each image's rows, (B,); 0 excludes an image."""

EXTRA = 3
"""Columns of a block in addition to the requested directions."""
_CACHE_BYTES = 2**29
_PIXELS = 2**22  # input values with a graph at a time
_PROJECTIONS = 4  # random projections per image for the trace


@dataclass(frozen=True)
class Stack:
    """A stacked Jacobian as an operator, with statistics from one pass."""

    apply: Apply
    """v -> sum_i J_i^T J_i v, on blocks (D, b)."""
    trace: float
    trace_error: float
    single: float | None
    """sum_i ||J_i||_2^2; None if unknown."""
    left_out: int


def products_are_cheaper(victim: Victim, split: Split, count: int) -> bool:
    """Whether K backwards per image cost more than three per direction of a block."""
    return classes_of(victim, split) > 3 * (count + EXTRA)


def build(victim: Victim, split: Split, weigh: Weigh, method: Literal["rows", "products"], seed: int) -> Stack:
    """Return the stack of a set, from one pass over it."""
    return _from_rows(victim, split, weigh) if method == "rows" else _from_products(victim, split, weigh, seed)


def _from_rows(victim: Victim, split: Split, weigh: Weigh) -> Stack:
    values = len(split) * classes_of(victim, split) * torch.Size(split.shape).numel()
    store: list[torch.Tensor] | None = [] if 4 * values <= _CACHE_BYTES else None
    trace, single, left_out = 0.0, 0.0, 0
    for jacobian, missing in _weighted(walk(victim, split), weigh):
        trace += float(frobenius(jacobian).double().square().sum())
        single += float(spectral(jacobian).double().square().sum())
        left_out += missing
        if store is not None:
            store.append(jacobian)

    def apply(block: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(block)
        for jacobian in store if store is not None else (j for j, _ in _weighted(walk(victim, split), weigh)):
            rows = jacobian.flatten(0, 1)
            total += rows.T @ (rows @ block.to(rows.dtype))
        return total

    return Stack(apply, trace, 0.0, single, left_out)


def _weighted(batches: Iterator[Rows], weigh: Weigh) -> Iterator[tuple[torch.Tensor, int]]:
    for rows in batches:
        weight = weigh(rows.margin)
        kept = weight > 0
        yield rows.jacobian[kept] * weight[kept, None, None], int((~kept).sum())


def _from_products(victim: Victim, split: Split, weigh: Weigh, seed: int) -> Stack:
    draw = generator(seed, "trace", device=victim.device)
    trace, variance, left_out = 0.0, 0.0, 0
    for images, labels in batches_of(victim, split):
        point, logits = forward(victim, images)
        weight = weigh(margins(logits.detach(), labels)).double()
        left_out += int((weight == 0).sum())
        squares = []
        for k in range(_PROJECTIONS):
            v = torch.randn(logits.shape, generator=draw, device=logits.device, dtype=logits.dtype)
            v = v / v.norm(dim=1, keepdim=True)
            row = victim.gradient(logits, point, len(point), v, keep=k + 1 < _PROJECTIONS).flatten(1).double()
            squares.append(logits.shape[1] * row.square().sum(1) * weight**2)
        drawn = torch.stack(squares)
        trace += float(drawn.mean(0).sum())
        variance += float(drawn.var(0).sum()) / _PROJECTIONS

    def apply(block: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(block)
        for images, labels in batches_of(victim, split):
            linear = Linearised(victim, images)
            weight = weigh(margins(linear.logits, labels))
            for k in range(block.shape[1]):
                pushed = linear.push(block[:, k].to(images.dtype).view(1, *split.shape))
                total[:, k] += linear.pull(pushed * weight[:, None] ** 2).sum(0).flatten()
        return total

    return Stack(apply, trace, variance**0.5, None, left_out)


def batches_of(victim: Victim, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over a split in batches whose graph needs little memory."""
    size = max(1, min(256, _PIXELS // torch.Size(split.shape).numel()))
    return split.batches(size, device=victim.device)


class Linearised:
    """A batch's Jacobians as operators: one forward serves every product, each of which costs one backward per image.

    J_i v is the derivative of u -> J_i^T u, which is linear, so no layer needs a forward-mode rule.

    Args:
        victim: the victim whose counts are updated.
        images: (B, C, H, W).

    Attributes:
        logits: (B, K), without a graph.
    """

    def __init__(self, victim: Victim, images: torch.Tensor) -> None:
        self._victim = victim
        self._point, self._answer = forward(victim, images)
        self.logits = self._answer.detach()
        with torch.enable_grad():
            self._dual = torch.zeros_like(self._answer, requires_grad=True)
            self._pulled = torch.zeros_like(self._point)
            if self._answer.requires_grad:
                victim.count_backward(len(images))
                (self._pulled,) = torch.autograd.grad(
                    self._answer, self._point, self._dual, create_graph=True, materialize_grads=True
                )

    def push(self, direction: torch.Tensor) -> torch.Tensor:
        """Return J_i v for a shared v (1, C, H, W) or one per image: (B, K)."""
        self._victim.count_backward(len(self._point))
        if not self._pulled.requires_grad:
            return torch.zeros_like(self.logits)
        (pushed,) = torch.autograd.grad(
            self._pulled, self._dual, direction.expand_as(self._point), retain_graph=True, materialize_grads=True
        )
        return pushed.detach()

    def pull(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Return J_i^T u_i, (B, C, H, W), for u (B, K)."""
        return self._victim.gradient(self._answer, self._point, len(self._point), cotangent, keep=True)
