"""The stacked Jacobian of a set: its Gram matrix, top spectrum and norms from p to q."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gambeson.analysis.inputs import classifier
from gambeson.analysis.jacobian import frobenius, spectral, walk
from gambeson.analysis.matrix_free import EXTRA, Linearised, batches_of, build, products_are_cheaper, top_eigenpairs
from gambeson.base import UserError, generator
from gambeson.data import Split
from gambeson.victim import Source, Victim

Weighting = Literal["none", "margin"]
"""``margin``: the rows of J_i are divided by the margin m_i, and misclassified images are left out (P4)."""


@dataclass(frozen=True)
class Spectrum:
    """The top of G = sum_i J_i^T J_i (over the stack's images), the square of the stacked Jacobian's."""

    values: torch.Tensor
    """(k,) float64, largest first: squared singular values sigma^2 of the stack, in squared logits per pixel unit."""
    residuals: torch.Tensor
    """(k,): an eigenvalue of G lies at most this far from each value."""
    directions: torch.Tensor
    """(k, C, H, W), unit L2 length. The first is the best universal L2 perturbation of the linearised model, up to its
    sign."""
    trace: float
    """tr G = sum_i ||J_i||_F^2, weighted by ``weighting``."""
    trace_error: float
    """Standard error of the trace; 0 if it is exact."""
    shared: float | None
    """The sharing factor rho = sigma_1^2 / sum_i ||J_i||_2^2 in [1/N, 1]: 1 is one worst direction for all images,
    1/N is N orthogonal ones. None if single spectral norms were not computed."""
    images: int
    """Number of images."""
    left_out: int
    """Misclassified images, which a margin-weighted stack leaves out."""
    weighting: Weighting
    method: Literal["gram", "rows", "products"]

    @property
    def ceiling(self) -> float:
        """The largest value plus its residual, from which bounds are computed."""
        return float(self.values[0] + self.residuals[0]) if len(self.values) else 0.0


def weights(margin: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """Return the weights of each image's rows, (B,); 0 excludes an image."""
    if weighting == "none":
        return torch.ones_like(margin)
    return torch.where(margin > 0, 1 / margin, torch.zeros_like(margin))


LARGEST = 4096
"""Maximum values per image for the full Gram matrix: 128 MiB in float64."""
_PANEL = 768


@dataclass(frozen=True)
class StackedGram:
    """G, with the norms of the single Jacobians."""

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
    """Compute G = sum_i J_i^T J_i over a set in one pass.

    Products of a batch are computed in float32, with 6 digits, and summed over batches in float64.

    Cost: one forward and K backwards per image, and about N*K*D^2 / 2 multiplications; memory 12 D^2 bytes plus one
        batch.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        weighting: ``margin`` for the stack of P4.

    Raises:
        UserError: images of more than 4096 values, or no image with a weight.
    """
    with classifier(model, data) as (victim, split):
        return stacked_grams(victim, split, (weighting,))[0]


def stacked_grams(victim: Victim, split: Split, weightings: tuple[Weighting, ...]) -> list[StackedGram]:
    """Compute several Gram matrices in one pass; see :func:`stacked_gram`."""
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
        # Plain stacks first, so that the weighted one can divide the rows in place.
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
    # The upper triangle only, panel by panel: torch has no symmetric product.
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

    ``gram``: from G itself (:func:`stacked_gram`), exact, images of up to 4096 values. Matrix-free, by block Lanczos on
    v -> sum_i J_i^T J_i v: ``rows`` computes every J_i, K backwards per image, once if all fit in 512 MiB, else once
    per pass; ``products`` computes only J_i v and J_i^T u, about three backwards per image, pass and direction, for
    models with many classes. ``auto`` selects the cheapest.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        count: number of directions.
        weighting: ``margin`` for the stack of P4.
        method: see above.
        tolerance: matrix-free: stop when ||G v - value v|| is this share of the largest value. The relative error of
            the value is then the square of that share over the relative gap to the next value. Default ours.
        seed: of the start, and of the random projections that ``products`` estimates the trace with.

    Raises:
        UserError: ``count`` below 1, or ``gram`` for larger images.
    """
    if count < 1:
        raise UserError(f"count = {count}: expected 1 direction or more")
    with classifier(model, data, seed) as (victim, split):
        if method == "auto" and torch.Size(split.shape).numel() <= LARGEST:
            method = "gram"
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


@dataclass(frozen=True)
class StackedNorm:
    """Lower and upper bound of ||Jbar||_{p->q} = max ||Jbar v||_q over ||v||_p = 1."""

    attained: float
    """||Jbar v||_q of the direction found: a lower bound."""
    bound: float
    """Hoelder's inequality, row by row: (sum_r ||row_r||_{p'}^q)^(1/q), 1/p + 1/p' = 1: an upper bound."""
    direction: torch.Tensor
    """(C, H, W), ||v||_p = 1."""
    p: float
    q: float


def stacked_norm(
    model: Source, data: Any, *, p: float = math.inf, q: float = 2.0, starts: int = 3, steps: int = 20, seed: int = 0
) -> StackedNorm:
    """Bound ||Jbar||_{p->q} from below and above (P3).

    From below by Boyd's power method v <- psi_{p'}(Jbar^T psi_q(Jbar v)), psi_r(z) = sign(z) |z|^(r-1), which never
    decreases but may end in a local maximum (Khrulkov and Oseledets, CVPR 2018, arXiv 1709.03582); the best of several
    starts is used. No efficient method is known for the norm itself for general p and q, so the upper bound is
    Hoelder's, which needs only the rows (ours). Both are equal for one row.

    Cost per image: one forward and K backwards; and per step one forward, one backward, and two per start.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        p: norm of the perturbation, above 1, may be infinite.
        q: norm of the change, 1 or above, finite.
        starts: random starts; default ours.
        steps: of the power method; default ours.
        seed: of the starts.

    Raises:
        UserError: p or q out of range.
    """
    if not p > 1 or not 1 <= q < math.inf:
        raise UserError(f"p = {p}, q = {q}: expected p above 1 (infinite allowed) and a finite q of 1 or above")
    dual = 1.0 if math.isinf(p) else p / (p - 1)
    with classifier(model, data, seed) as (victim, split):
        draw = generator(seed, "power", device=victim.device)
        v = torch.randn(max(1, starts), *split.shape, generator=draw, device=victim.device)
        v = _dual(v.double(), p)
        best, value = v, torch.zeros(len(v), dtype=torch.float64, device=v.device)
        for _ in range(steps + 1):
            reached, pulled = _round(victim, split, v, q)
            rises = reached > value
            best = torch.where(rises.view(-1, 1, 1, 1), v, best)
            if not bool((reached > value * (1 + 1e-7)).any()):
                break
            value = torch.maximum(value, reached)
            v = _dual(pulled, p)
        total = 0.0
        for rows in walk(victim, split, needs_margin=False):
            total += float(rows.jacobian.double().flatten(0, 1).norm(p=dual, dim=1).pow(q).sum())
    top = int(value.argmax())
    return StackedNorm(float(value[top]), total ** (1 / q), best[top].float(), p, q)


def _round(victim: Victim, split: Split, v: torch.Tensor, q: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ||Jbar v||_q and Jbar^T psi_q(Jbar v) of each start."""
    powers, pulled = torch.zeros(len(v), dtype=torch.float64, device=v.device), torch.zeros_like(v)
    for images, _ in batches_of(victim, split):
        line = Linearised(victim, images)
        for k, direction in enumerate(v):
            pushed = line.push(direction[None].to(images.dtype)).double()
            powers[k] += pushed.abs().pow(q).sum()
            cotangent = pushed.sign() * pushed.abs().pow(q - 1)
            pulled[k] += line.pull(cotangent.to(images.dtype)).double().sum(0)
    return powers.pow(1 / q), pulled


def _dual(u: torch.Tensor, p: float) -> torch.Tensor:
    """Return the v of each row with ||v||_p = 1 that maximises <u, v>; for infinite p, ones where u is zero."""
    if math.isinf(p):
        return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)
    u = u / u.flatten(1).abs().amax(1).clamp(min=1e-300).view(-1, 1, 1, 1)
    v = u.sign() * u.abs().pow(1 / (p - 1))
    return v / v.flatten(1).norm(p=p, dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
