"""A Jacobian analysis for the tests: synthetic, but of the real schema, with numbers that differ between models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import interpolate

from gambeson.analysis import (
    BoundRow,
    BoundTable,
    GradientSharing,
    GradientStatistics,
    JacobianNorms,
    PairSharing,
    Spread,
)
from gambeson.auditing.jacobian_results import RANGES, Bounds, JacobianResult, LossSurface, PairHistogram, Subspace
from gambeson.base import generator, save_tensors
from gambeson.evaluation.rates import Cost

POINTS = 17


def jacobian(folder: Path, radii: tuple[float, ...], shape: list[int], seed: int, *, ridge: bool) -> JacobianResult:
    """Write ``jacobian.safetensors`` and return what an audit says about it."""
    draw = generator(seed, "jacobian")
    direction = interpolate(torch.randn(1, shape[0], 5, 5, generator=draw), shape[1:], mode="bicubic")[0]
    save_tensors(folder / "jacobian.safetensors", {"direction": direction / direction.norm()}, {"eps": radii[2]})
    return JacobianResult(
        images=200,
        norms=JacobianNorms(
            frobenius=_spread(11.3 + seed),
            spectral=_spread(7.9 + seed / 2),
            reach=_spread(0.93 + seed / 10, 188),
            regulariser=63.0,
            errors=12,
        ),
        gradients=GradientStatistics(
            images=200,
            loss_norm=_spread(0.21 + seed / 20),
            margin_norm=_spread(3.3),
            loss_zero=0.755 if ridge else 0.005,
            margin_zero=0.0,
            zero_values=0.2,
            saturated=0.135,
            logit_range=_spread(17.0),
            rescaled_norm=_spread(0.5),
            rescaled_ratio=2.4,
        ),
        gradient_sharing=GradientSharing(ratio=0.4893 - seed / 100, universal=1.1, per_image=2.2, norm="inf"),
        sharing=0.2524 - seed / 100,
        bounds=Bounds(eps=list(radii), table=_bounds(radii, seed)),
        pairs=[PairHistogram.of(_pairs(seed), metric) for metric in RANGES],
        surface=surface(radii[2], seed, ridge=ridge),
        subspaces=[_subspace("inf", radii[2], seed), _subspace("2", 7 * radii[2], seed + 1)],
        left_out={"subspace of a guide": "no guide was given"} if ridge else {},
        file="jacobian.safetensors",
        cost=Cost(forwards=13_840, backwards=9691 + seed),
    )


def surface(extent: float, seed: int, *, ridge: bool) -> LossSurface:
    """A loss that rises along the gradient, or falls again behind a ridge."""
    steps = torch.linspace(-extent, extent, POINTS, dtype=torch.float64)
    u, v = torch.meshgrid(steps / extent, steps / extent, indexing="ij")
    bump = (-((u - 0.3) ** 2) / 0.03).exp() if ridge else 0 * u
    loss = (0.2 + 0.05 * seed) + (2.5 - seed / 8) * torch.nn.functional.softplus(4 * u - 1) / 3 + 0.3 * v**2 + 3 * bump
    wrong = ((loss - 0.3) / 2).clamp(0, 1)
    singles = [loss * (1 + 0.3 * torch.sin(3 * v + k)) for k in range(2)]
    return LossSurface(
        images=20,
        steps=steps.tolist(),
        loss=loss.tolist(),
        wrong=wrong.tolist(),
        singles=[single.tolist() for single in singles],
        ridge=_spread(2.1 if ridge else 0.0, 20),
    )


def _bounds(radii: tuple[float, ...], seed: int) -> BoundTable:
    rows = [
        BoundRow(
            length_inf=eps,
            length_2=20 * eps,
            effect=(900 - seed) * eps,
            spectral_bound=2000 * eps,
            frobenius_bound=8e4 * eps,
            box_mean=1000.0,
            box_bound=1e5,
            box_frobenius_bound=8e5,
            linear_error=0.0212 + eps + seed / 100,
            counted_error=0.0313 + 1.5 * eps,
            effect_error=min(1.0, 0.1 + 2.5 * eps),
            bound_error=1.0,
            measured_error=0.0191 + eps + seed / 90,
        )
        for eps in radii
    ]
    return BoundTable(
        rows=tuple(rows),
        images=200,
        errors=4,
        sigma=50.0,
        weighted_sigma=10.0,
        trace=25_000.0,
        trace_error=0.0,
        box_tightness=79.0,
    )


def _pairs(seed: int) -> PairSharing:
    draw = generator(seed, "pairs of a report")
    same = torch.arange(400) < 200
    values = {}
    for metric, (low, high) in RANGES.items():
        place = torch.where(same, 0.75, 0.55) + 0.07 * torch.randn(400, generator=draw)
        values[metric] = (low + (high - low) * place).clamp(low, high)
    return PairSharing(torch.zeros(400, 2, dtype=torch.int64), same, values)


def _subspace(norm: str, eps: float, seed: int) -> Subspace:
    shares = [0.81 - seed / 50, 0.43, 0.11, 0.0]
    return Subspace(
        norm=norm,
        eps=eps,
        orders=[1, 4, 16, 64],
        shares=shares,
        eligible=35,
        dead=1,
        dimension=_spread(2.0, 35),
        cosine=[0.0, 0.1, 0.1, 0.2],
    )


def _spread(middle: float, n: int = 200) -> Spread:
    return Spread(mean=middle * 1.02, low=middle * 0.7, median=middle, high=middle * 1.4, n=n)
