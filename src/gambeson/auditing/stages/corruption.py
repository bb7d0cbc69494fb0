"""The corruption stage: errors under Gaussian, uniform, and salt-and-pepper noise."""

from __future__ import annotations

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import Corruption
from gambeson.base import generator, seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.universal import error_rate
from gambeson.threat import norm_of_ones
from gambeson.victim import auto_batch_size, score, vote

NOISES = ("gaussian", "uniform", "salt-and-pepper")


def noisy(images: torch.Tensor, noise: str, size: float, draw: torch.Generator) -> torch.Tensor:
    """Return images (N, C, H, W) with independent noise, clipped to [0, 1].

    Args:
        images: in [0, 1].
        noise: one of :data:`NOISES`.
        size: of ``gaussian`` the standard deviation, of ``uniform`` the half-width, of ``salt-and-pepper`` the
            probability that a pixel becomes black or white, in all its channels.
        draw: on the device of the images.
    """
    if noise == "gaussian":
        moved = images + size * torch.randn(images.shape, generator=draw, device=images.device)
    elif noise == "uniform":
        moved = images + size * (2 * torch.rand(images.shape, generator=draw, device=images.device) - 1)
    else:
        pixels = (len(images), 1, *images.shape[2:])
        hit = torch.rand(pixels, generator=draw, device=images.device) < size
        white = torch.rand(pixels, generator=draw, device=images.device) < 0.5
        moved = torch.where(hit, white.to(images.dtype).expand_as(images), images)
    return moved.clamp(0, 1)


def measure(context: AuditContext) -> list[Corruption]:
    """Measure every noise at every size of the suite, in multiples of the middle eps per pixel."""
    unit = context.eps / norm_of_ones(context.suite.norm, context.test.shape)
    sizes = sorted({min(1.0, times * unit) for times in context.suite.noise_sizes})
    return [
        Corruption(noise=noise, size=size, error=_error(context, noise, size)) for noise in NOISES for size in sizes
    ]


def _error(context: AuditContext, noise: str, size: float) -> Rate:
    victim, test = context.victim, context.test
    draw = generator(context.seed, "corruption", noise, f"{size:.6g}", device=victim.device)
    with seeded(context.seed, "corruption"):  # for the votes of a random model
        predictions = [
            vote(victim, noisy(images, noise, size, draw)).cpu()
            for images, _ in test.batches(auto_batch_size(test.shape), device=victim.device)
        ]
    return error_rate(score(torch.cat(predictions), test))
