"""Times taken side by side: every candidate once a round, in turn, and the median of its ratios to a baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gambeson import models
from gambeson.base import Config, generator, seeded, task


class BenchSettings(Config):
    """What is timed: an attack, or a step of training with one inside, on random images and a fresh network."""

    model: str = "resnet20"
    channels: Annotated[int, Field(ge=1)] = 3
    image_size: Annotated[int, Field(ge=8)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 128
    steps: Annotated[int, Field(ge=1)] = 10
    """Of PGD."""
    eps: float = 8 / 255
    rounds: Annotated[int, Field(ge=3)] = 7
    """Timed rounds; in each, every candidate runs once, in turn."""
    bfloat16: bool = False
    """Time ours in bfloat16 as well."""
    device: str = "cpu"
    seed: int = 0

    def network(self) -> nn.Module:
        """The network, always with the same weights, in evaluation mode."""
        with seeded(self.seed, "bench"):
            model = models.create(self.model, in_channels=self.channels, classes=10, image_size=self.image_size)
        return model.eval().to(self.device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images (N, C, H, W) and labels (N,)."""
        shape = (self.batch_size, self.channels, self.image_size, self.image_size)
        draw = generator(self.seed, "bench")
        x, y = torch.rand(shape, generator=draw), torch.randint(0, 10, shape[:1], generator=draw)
        return x.to(self.device), y.to(self.device)


class Timing(Config):
    """One candidate's time over the rounds."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over the rounds of its time divided by the baseline's in the same round."""
    ratio_low: float
    ratio_high: float
    """Smallest and largest ratio of a round."""
    work: float = 0.0
    """Floating-point operations of its convolutions and matrix products, counted while it warmed up."""


class BenchResult(Config):
    """What a benchmark leaves."""

    settings: BenchSettings
    timings: list[Timing]
    peaks: dict[str, float]
    """Operations a second of a large matrix product here, by type: what :attr:`Timing.work` a second can reach."""
    ideal: float | None = None
    """What counting forwards and backwards promises: the baseline's time over ours; None where both do the same."""
    environment: dict[str, str]

    def images_a_second(self, timing: Timing) -> float:
        """Images of a candidate, each attacked or trained on once."""
        return self.settings.batch_size / timing.seconds

    def share_of_peak(self, timing: Timing) -> float:
        """A candidate's operations a second over those of a matrix product of its type."""
        kind = "bfloat16" if "bfloat16" in timing.name else "float32"
        return timing.work / timing.seconds / self.peaks[kind]


def matmul_peaks(settings: BenchSettings) -> dict[str, float]:
    """Measure operations a second of a large matrix product: the best of a few, in each type that is timed."""
    size = 1024 if settings.device == "cpu" else 8192
    found = {}
    for kind in ("float32", "bfloat16") if settings.bfloat16 else ("float32",):
        a = torch.rand(size, size, device=settings.device).to(getattr(torch, kind))
        taken = []
        for _ in range(8):
            began = time.perf_counter()
            a @ a
            _wait()
            taken.append(time.perf_counter() - began)
        found[kind] = 2 * size**3 / min(taken)
    return found


class _Operations(TorchDispatchMode):
    """Counts by torch's own formulas; its counter by module cannot watch ``torch.autograd.grad``."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self.total, self.formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def side_by_side(
    candidates: Mapping[str, Callable[[], object]], baseline: str, rounds: int, title: str
) -> list[Timing]:
    """Run every candidate once a round, after one round that warms up, and compare it with the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    work: dict[str, float] = {}
    with task(title, rounds + 1) as advance:
        for lap in range(rounds + 1):
            for name, run in candidates.items():
                if not lap:
                    with _Operations() as counted:
                        run()
                    work[name] = counted.total
                    continue
                _wait()
                began = time.perf_counter()
                run()
                _wait()
                taken[name].append(time.perf_counter() - began)
            advance()
    return [_timing(name, seconds, taken[baseline], work[name]) for name, seconds in taken.items()]


def _timing(name: str, seconds: list[float], baseline: list[float], work: float) -> Timing:
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return Timing(
        name=name,
        seconds=statistics.median(seconds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        work=work,
    )
