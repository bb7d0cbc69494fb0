"""Speed of attacks against the bare loop that anyone would write: medians of ratios, taken side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gambeson import models
from gambeson.attacks import PGD
from gambeson.base import Config, environment, generator, seeded, task

Attack = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
BARE = "bare loop"


class BenchSettings(Config):
    """What is timed."""

    model: str = "resnet20"
    channels: Annotated[int, Field(ge=1)] = 3
    image_size: Annotated[int, Field(ge=8)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 128
    steps: Annotated[int, Field(ge=1)] = 10
    eps: float = 8 / 255
    rounds: Annotated[int, Field(ge=3)] = 7
    """Timed rounds; in each, every candidate runs once, in turn."""
    seed: int = 0


class Timing(Config):
    """One candidate's time over the rounds."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over the rounds of its time divided by the bare loop's in the same round."""
    ratio_low: float
    ratio_high: float
    """Smallest and largest ratio of a round."""


class BenchResult(Config):
    """What a benchmark leaves."""

    settings: BenchSettings
    timings: list[Timing]
    environment: dict[str, str]


def bare_pgd(settings: BenchSettings) -> Attack:
    """The plain loop: forward, gradient with respect to the images alone, sign, project, clip."""

    def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        adversarial = x + torch.empty_like(x).uniform_(-settings.eps, settings.eps)
        for _ in range(settings.steps):
            adversarial = adversarial.clamp(0, 1).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(adversarial), y), adversarial)
            moved = adversarial.detach() + settings.eps / 4 * gradient.sign()
            adversarial = torch.min(torch.max(moved, x - settings.eps), x + settings.eps)
        return adversarial.clamp(0, 1).detach()

    return attack


def ours(settings: BenchSettings) -> Attack:
    """Our PGD at the same steps, every step taken: no image stops early."""
    return PGD(eps=settings.eps, steps=settings.steps, step=0.25, early_stop=False)


def bench_attacks(settings: BenchSettings, peers: Mapping[str, Attack] | None = None) -> BenchResult:
    """Time PGD at equal steps: the bare loop, ours, and any peers.

    Args:
        settings: model, batch and rounds.
        peers: other implementations by name, called as ``attack(model, x, y)``.
    """
    with seeded(settings.seed, "bench"):
        model = models.create(
            settings.model, in_channels=settings.channels, classes=10, image_size=settings.image_size
        ).eval()
    shape = (settings.batch_size, settings.channels, settings.image_size, settings.image_size)
    draw = generator(settings.seed, "bench")
    x, y = torch.rand(shape, generator=draw), torch.randint(0, 10, shape[:1], generator=draw)
    candidates = {BARE: bare_pgd(settings), "gambeson": ours(settings), **(peers or {})}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    with task("bench attacks", settings.rounds + 1) as advance:
        for lap in range(settings.rounds + 1):
            for name, attack in candidates.items():
                began = time.perf_counter()
                attack(model, x, y)
                if lap:  # the first lap warms up
                    taken[name].append(time.perf_counter() - began)
            advance()
    return BenchResult(
        settings=settings,
        timings=[_timing(name, seconds, taken[BARE]) for name, seconds in taken.items()],
        environment=environment(),
    )


def _timing(name: str, seconds: list[float], bare: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(seconds, bare, strict=True)]
    return Timing(
        name=name,
        seconds=statistics.median(seconds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )
