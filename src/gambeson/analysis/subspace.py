"""GAAS: number of orthogonal adversarial directions at an image (Tramèr et al. 2017 and 2018, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gambeson.analysis.gradient_masking import loss_gradient
from gambeson.analysis.inputs import held
from gambeson.base import UserError, generator
from gambeson.tasks import CLASSIFICATION, as_pair
from gambeson.threat import Ball, Norm, perturb
from gambeson.victim import Source, predicted

ORDERS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Subspace:
    """Number of adversarial directions among k orthogonal ones of length eps, per image."""

    orders: tuple[int, ...]
    """The values of k tried: the requested ones that fit the image."""
    counts: torch.Tensor
    """(orders, N): number of adversarial directions, for the best permutation."""
    eligible: torch.Tensor
    """(N,) bool: correctly classified and with a non-zero gradient; others have no dimension."""
    dead: int
    """Correctly classified images with zero gradient, for which ``guide`` is needed."""
    cosine: torch.Tensor
    """(orders,): largest |cosine| of two directions after clipping to [0, 1]; before it they are orthogonal."""
    length: torch.Tensor
    """(orders,): mean length after clipping, as a share of eps."""

    @property
    def dimension(self) -> torch.Tensor:
        """(N,): the largest count of any order; 0 for images that are not eligible."""
        return self.counts.amax(0) * self.eligible

    def share_at_least(self, k: int) -> float:
        """Return the share of eligible images with a dimension of k or more; NaN without any."""
        found = self.dimension[self.eligible]
        return float((found >= k).double().mean()) if len(found) else float("nan")


def hadamard(order: int) -> torch.Tensor:
    """Return the regular Hadamard matrix of an order 4^m: orthogonal rows of signs, each with sum sqrt(order).

    Raises:
        UserError: another order.
    """
    four = torch.ones(4, 4)
    four[torch.arange(4), 3 - torch.arange(4)] = -1  # one minus sign per row and column
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.kron(matrix, four)
    if len(matrix) != order:
        raise UserError(f"no regular Hadamard matrix of order {order}: choose 1, 4, 16, 64 or 256")
    return matrix


def adversarial_subspace(
    model: Source,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float | str,
    norm: Norm = "inf",
    orders: tuple[int, ...] = ORDERS,
    permutations: int = 2,
    guide: torch.Tensor | None = None,
    seed: int = 0,
) -> Subspace:
    """Count orthogonal adversarial directions around each image: a lower bound of the adversarial cone's dimension.

    For each k, k orthogonal directions r_i of length eps equally aligned with the gradient g, are tested. Norm inf:
    g.r_i is about eps ||g||_1 / sqrt(k), the maximum, by a regular Hadamard matrix over a random permutation of the
    values in blocks of k; leftover values are 0 (after the paper's "randomised combinatorial construction", whose
    appendix is not known to us). Norm 2: g.r_i = eps ||g||_2 / sqrt(k) exactly, for any k.

    Cost per image: one forward and one backward, then sum(orders) forwards per permutation.

    Args:
        model: a module or a victim.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        eps: length of every direction, in pixel units.
        norm: inf or 2.
        orders: the k to try; for inf powers of 4. Those above the number of values are left out. Default ours (the
            paper has k up to 100).
        permutations: random permutations (bases, for the norm 2) per k, of which the best counts; default ours.
        guide: (N, C, H, W), used instead of g, such as a multi-step perturbation for a model that masks its gradient.
        seed: of the permutations, and of a random model's draws.

    Raises:
        UserError: the norm 1, no images, an order that does not fit, or images and labels that do not.
    """
    ball = Ball(eps=eps, norm=norm)
    if ball.norm == "1":
        raise UserError("norm = '1': the adversarial subspace is defined for the norms inf and 2")
    images, labels, _ = as_pair(images, labels, CLASSIFICATION, floats=True)
    if not len(images):
        raise UserError("there are no images: expected at least one")
    fitting = tuple(k for k in orders if 1 <= k <= images[0].numel())
    if not fitting:
        raise UserError(f"orders = {orders}: expected one between 1 and {images[0].numel()}, an image's values")
    with held(model, seed) as victim, torch.no_grad():
        g, margin = loss_gradient(victim, images, labels)
        if guide is not None:
            g = guide.to(g)
        alive = g.flatten(1).any(1)
        counts = torch.zeros(len(fitting), len(images), dtype=torch.int64, device=images.device)
        cosines, lengths = torch.zeros(len(fitting)), torch.zeros(len(fitting))
        for row, k in enumerate(fitting):
            for turn in range(max(1, permutations)):
                draw = generator(seed, "subspace", k, turn, device=images.device)
                hits, clipped = torch.zeros_like(counts[row]), []
                for direction in directions(g, ball, k, draw):
                    moved = perturb(images, direction)
                    hits += predicted(victim.forward_original(moved)) != labels
                    clipped.append((moved - images).flatten(1))
                counts[row] = torch.maximum(counts[row], hits)
                if turn == 0:
                    cosines[row], lengths[row] = _after_clip(clipped, ball)
    eligible = (margin > 0) & alive
    return Subspace(fitting, counts, eligible, int(((margin > 0) & ~alive).sum()), cosines, lengths)


def directions(g: torch.Tensor, ball: Ball, k: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield k orthogonal directions (N, C, H, W) of length eps, equally aligned with g (N, C, H, W) at each image."""
    size = g[0].numel()
    if ball.norm == "inf":
        matrix = hadamard(k).to(g)
        # Values without gradient get random signs, so that the directions keep their length and stay orthogonal.
        coin = torch.randint(0, 2, g.shape, generator=draw, device=g.device).to(g.dtype) * 2 - 1
        signs = ball.fill(torch.where(g == 0, coin, g.sign())).flatten(1)
        order = torch.randperm(size, generator=draw, device=g.device)[: size // k * k]
        for row in matrix:
            pattern = g.new_zeros(size)
            pattern[order] = row.repeat(size // k)
            yield (signs * pattern).view_as(g)
        return
    # A random orthonormal frame whose rows all have the cosine 1 / sqrt(k) with its mean direction; a reflection per
    # image then maps that mean to g.
    basis = torch.linalg.qr(torch.randn(size, k, generator=draw, device=g.device, dtype=torch.float64)).Q.T
    mean = torch.full((k,), k**-0.5, dtype=torch.float64, device=g.device) @ basis
    unit = g.flatten(1).double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-300)
    mirror = mean - unit
    mirror = mirror / mirror.norm(dim=1, keepdim=True).clamp(min=1e-300)
    for line in basis:
        turned = line - 2 * (mirror @ line)[:, None] * mirror
        yield ball.project((ball.eps * turned).to(g.dtype).view_as(g))


def _after_clip(moves: list[torch.Tensor], ball: Ball) -> tuple[float, float]:
    stacked = torch.stack(moves, 1)  # (N, k, D)
    gram = stacked @ stacked.transpose(1, 2)
    own = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosine = gram / (own[:, :, None] * own[:, None, :]).clamp(min=1e-30)
    off = cosine.abs() * (1 - torch.eye(stacked.shape[1], device=gram.device))
    size = stacked.abs().amax(2) if ball.norm == "inf" else own
    return float(off.max()), float(size.mean() / ball.eps) if ball.eps > 0 else 0.0
