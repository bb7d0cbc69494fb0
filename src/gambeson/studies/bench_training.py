"""Speed of adversarial training against the loop that public reference code has: medians of ratios, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gambeson import models
from gambeson.base import Config, environment, generator, seeded
from gambeson.defenses import Batch, Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.studies.timing import Timing, side_by_side

PLAIN = "plain loop"


class TrainingBench(Config):
    """What is timed: one step of training, PGD inside."""

    model: str = "resnet20"
    channels: Annotated[int, Field(ge=1)] = 3
    image_size: Annotated[int, Field(ge=8)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 128
    steps: Annotated[int, Field(ge=1)] = 7
    """Of PGD."""
    eps: float = 8 / 255
    rounds: Annotated[int, Field(ge=3)] = 7
    bfloat16: bool = False
    """Time crafting in bfloat16 as well."""
    seed: int = 0

    @property
    def ideal(self) -> float:
        """What counting promises: the time of a plain step over ours.

        A forward, a gradient of the images and one of the weights cost the same; nothing else costs anything.
        """
        return 3 * (self.steps + 1) / (2 * self.steps + 3)


class TrainingBenchResult(Config):
    """What the benchmark leaves."""

    settings: TrainingBench
    ideal: float
    timings: list[Timing]
    environment: dict[str, str]


def bench_training(settings: TrainingBench) -> TrainingBenchResult:
    """Time one step of each: the plain loop, ours at sharedness 1 and at the whole batch, and standard training."""
    draw = generator(settings.seed, "bench")
    shape = (settings.batch_size, settings.channels, settings.image_size, settings.image_size)
    x, y = torch.rand(shape, generator=draw), torch.randint(0, 10, shape[:1], generator=draw)
    attack = {"eps": settings.eps, "steps": settings.steps, "step": 0.25}
    shared = {**attack, "sigma": 1.0, "truncate": None}
    candidates = {
        PLAIN: _plain_step(settings, x, y),
        "pgd-adversarial": _our_step(settings, PGDAdversarial(**attack), x, y),
        "shared-adversarial, sharedness 1": _our_step(settings, SharedAdversarial(sharedness=1, **shared), x, y),
        f"shared-adversarial, sharedness {settings.batch_size}": _our_step(
            settings, SharedAdversarial(sharedness=settings.batch_size, **shared), x, y
        ),
        "standard": _our_step(settings, Standard(), x, y),
    }
    if settings.bfloat16:
        candidates["pgd-adversarial, bfloat16 crafting"] = _our_step(
            settings, PGDAdversarial(craft_precision="bfloat16", **attack), x, y
        )
    timings = side_by_side(candidates, PLAIN, settings.rounds, "bench training")
    return TrainingBenchResult(settings=settings, ideal=settings.ideal, timings=timings, environment=environment())


def _model(settings: TrainingBench) -> tuple[nn.Module, torch.optim.Optimizer]:
    with seeded(settings.seed, "bench"):
        model = models.create(
            settings.model, in_channels=settings.channels, classes=10, image_size=settings.image_size
        ).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _plain_step(settings: TrainingBench, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model, optimizer = _model(settings)

    def step() -> None:
        moved = (x + torch.empty_like(x).uniform_(-settings.eps, settings.eps)).clamp(0, 1)
        for _ in range(settings.steps):
            moved = moved.detach().requires_grad_()
            F.cross_entropy(model(moved), y).backward()
            assert moved.grad is not None
            ahead = moved.detach() + settings.eps / 4 * moved.grad.sign()
            moved = torch.min(torch.max(ahead, x - settings.eps), x + settings.eps).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(moved), y).backward()
        optimizer.step()

    return step


def _our_step(settings: TrainingBench, defense: Defense, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model, optimizer = _model(settings)
    batch = Batch(images=x, labels=y, seed=settings.seed)

    def step() -> None:
        losses = defense.losses(model, batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()

    return step
