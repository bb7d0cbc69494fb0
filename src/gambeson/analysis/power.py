"""P3: bounds in any norm, and the (p, q)-singular vector that attains them as far as it is known how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gambeson.analysis.jacobian import walk
from gambeson.analysis.matrix_free import Linearised, batches_of
from gambeson.analysis.views import Source, labelled, opened
from gambeson.base import UserError, generator
from gambeson.data import Split
from gambeson.victim import Victim


@dataclass(frozen=True)
class StackedNorm:
    """The stacked Jacobian's norm ||Jbar||_{p->q} = max ||Jbar v||_q over ||v||_p = 1, from both sides."""

    attained: float
    """||Jbar v||_q of the direction found: a lower bound."""
    bound: float
    """Hoelder's inequality, row by row: (sum_r ||row_r||_{p'}^q)^(1/q), 1/p + 1/p' = 1: an upper bound."""
    direction: torch.Tensor
    """(C, H, W), ||v||_p = 1."""
    p: float
    q: float

    def effect_bound(self, length: float) -> float:
        """Return P3, the bound of sum_i ||J_i delta||_q^q for ||delta||_p = ``length``."""
        return (self.bound * length) ** self.q


def stacked_norm(
    model: Source, data: Any, *, p: float = math.inf, q: float = 2.0, starts: int = 3, steps: int = 20, seed: int = 0
) -> StackedNorm:
    """Bound ||Jbar||_{p->q} (notes on Jacobian regularisation, P3 and section 6).

    From below by Boyd's power method v <- psi_{p'}(Jbar^T psi_q(Jbar v)), psi_r(z) = sign(z) |z|^(r-1), which never
    falls but may stop at a local maximum (Khrulkov and Oseledets, CVPR 2018, arXiv 1709.03582); the best of several
    starts. For general p and q no efficient method is known that gives the norm itself, so the upper bound is
    Hoelder's, which needs the rows only (ours). Equal for one row.

    Cost an image: one forward and K backwards; and a step one forward, one backward, and two a start.

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
    split = labelled(data)
    dual = 1.0 if math.isinf(p) else p / (p - 1)
    with opened(model) as victim:
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
    """Return the v of each row with ||v||_p = 1 that maximises <u, v>; ones where u is zero, for p infinite."""
    if math.isinf(p):
        return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)
    u = u / u.flatten(1).abs().amax(1).clamp(min=1e-300).view(-1, 1, 1, 1)
    v = u.sign() * u.abs().pow(1 / (p - 1))
    return v / v.flatten(1).norm(p=p, dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
