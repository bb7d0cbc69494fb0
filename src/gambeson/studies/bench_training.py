"""Speed of adversarial training against the loop that public reference code has: medians of ratios, side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.base import environment
from gambeson.defenses import Batch, Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.studies.timing import BenchResult, BenchSettings, matmul_peaks, side_by_side

PLAIN = "plain loop"


def ideal(steps: int) -> float:
    """What counting promises: the time of a plain step over ours.

    A forward, a gradient of the images and one of the weights cost the same; nothing else costs anything.

    Args:
        steps: of PGD.
    """
    return 3 * (steps + 1) / (2 * steps + 3)


def bench_training(settings: BenchSettings) -> BenchResult:
    """Time one step of each: the plain loop, ours at sharedness 1 and at the whole batch, and standard training."""
    x, y = settings.batch()
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
    return BenchResult(
        settings=settings,
        timings=timings,
        peaks=matmul_peaks(settings),
        ideal=ideal(settings.steps),
        environment=environment(torch.device(settings.device)),
    )


def _model(settings: BenchSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = settings.network().train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _plain_step(settings: BenchSettings, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
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


def _our_step(settings: BenchSettings, defense: Defense, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model, optimizer = _model(settings)
    model.to(memory_format=torch.channels_last)  # as a recipe with channels_last has it
    batch = Batch(images=x, labels=y, seed=settings.seed)

    def step() -> None:
        losses = defense.losses(model, batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()

    return step
