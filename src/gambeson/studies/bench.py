"""Speed of attacks against the bare loop that anyone would write: medians of ratios, taken side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.attacks import PGD
from gambeson.base import environment
from gambeson.studies.timing import BenchResult, BenchSettings, matmul_peaks, side_by_side
from gambeson.victim import Fast, Victim

Attack = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
BARE, BACKWARD = "bare loop", "bare loop with loss.backward()"


def bare_pgd(settings: BenchSettings, *, whole: bool = False) -> Attack:
    """The plain loop: forward, gradient with respect to the images alone, sign, project, clip.

    ``whole`` takes the gradient by ``loss.backward()``, as public reference code does: that of the weights as well.
    """

    def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        adversarial = x + torch.empty_like(x).uniform_(-settings.eps, settings.eps)
        for _ in range(settings.steps):
            adversarial = adversarial.clamp(0, 1).detach().requires_grad_()
            loss = F.cross_entropy(model(adversarial), y)
            if whole:
                loss.backward()
                gradient = adversarial.grad
                model.zero_grad()
            else:
                (gradient,) = torch.autograd.grad(loss, adversarial)
            assert gradient is not None
            moved = adversarial.detach() + settings.eps / 4 * gradient.sign()
            adversarial = torch.min(torch.max(moved, x - settings.eps), x + settings.eps)
        return adversarial.clamp(0, 1).detach()

    return attack


def ours(settings: BenchSettings) -> PGD:
    """Our PGD at the same steps, every step taken: no image stops early."""
    return PGD(eps=settings.eps, steps=settings.steps, step=0.25, early_stop=False)


def bench_attacks(settings: BenchSettings, peers: Mapping[str, Attack] | None = None) -> BenchResult:
    """Time PGD at equal steps: the bare loop, ours, and any peers.

    Args:
        settings: model, batch and rounds.
        peers: other implementations by name, called as ``attack(model, x, y)``.
    """
    model, (x, y) = settings.network(), settings.batch()
    candidates: dict[str, Attack] = {
        BARE: bare_pgd(settings),
        BACKWARD: bare_pgd(settings, whole=True),
        "gambeson": ours(settings),
        **(peers or {}),
    }
    runs: dict[str, Callable[[], object]] = {name: partial(attack, model, x, y) for name, attack in candidates.items()}
    if settings.bfloat16:
        runs["gambeson, bfloat16"] = partial(_in_bfloat16, ours(settings), model, x, y)
    return BenchResult(
        settings=settings,
        timings=side_by_side(runs, BARE, settings.rounds, "bench attacks"),
        peaks=matmul_peaks(settings),
        environment=environment(torch.device(settings.device)),
    )


def _in_bfloat16(attack: PGD, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with Victim(model, fast=Fast(precision="bfloat16")) as victim:
        return attack(victim, x, y)
