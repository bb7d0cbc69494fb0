"""Benchmarks: candidates run alternately in rounds; the result is the median ratio to a baseline."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gambeson import models
from gambeson.attacks import PGD, StochasticPGD
from gambeson.auditing import AuditRun, run_audit
from gambeson.base import Config, environment, generator, read_json, seeded, task
from gambeson.data import Dataset, Split
from gambeson.defenses import Batch, Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.models.loading import load_model
from gambeson.victim import FastPath, Victim
from gambeson.victim.inspect import logits_of


class BenchSettings(Config):
    """Settings: an attack, or a training step with one inside, on random images and a fresh network."""

    model: str = "resnet20"
    channels: Annotated[int, Field(ge=1)] = 3
    image_size: Annotated[int, Field(ge=8)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 128
    steps: Annotated[int, Field(ge=1)] = 10
    """PGD steps."""
    eps: float = 8 / 255
    rounds: Annotated[int, Field(ge=3)] = 7
    """Timed rounds, in each of which every candidate runs once."""
    bfloat16: bool = False
    """Also time ours in bfloat16."""
    device: str = "cpu"
    seed: int = 0

    def network(self) -> nn.Module:
        """The network, with fixed weights, in evaluation mode."""
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
    """Timing of one candidate."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over the rounds of its time relative to the baseline's in the same round."""
    ratio_low: float
    ratio_high: float
    """Smallest and largest ratio of a round."""
    work: float = 0.0
    """Floating-point operations of its convolutions and matrix products, counted while it warmed up."""


class BenchResult(Config):
    """Result of a benchmark."""

    settings: BenchSettings
    timings: list[Timing]
    peaks: dict[str, float]
    """Operations per second of a large matrix product, by dtype: an upper bound of :attr:`Timing.work` per second."""
    ideal: float | None = None
    """Expected speed-up from counting forwards and backwards; None if both do the same work."""
    environment: dict[str, str]

    def images_a_second(self, timing: Timing) -> float:
        """Images per second of a candidate, each attacked or trained on once."""
        return self.settings.batch_size / timing.seconds

    def share_of_peak(self, timing: Timing) -> float:
        """A candidate's operations per second over those of a matrix product of its type."""
        kind = "bfloat16" if "bfloat16" in timing.name else "float32"
        return timing.work / timing.seconds / self.peaks[kind]


def matmul_peaks(settings: BenchSettings) -> dict[str, float]:
    """Measure operations per second of a large matrix product, the best of a few, in each dtype."""
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
    """Counts operations with torch's formulas; torch's module counter does not support ``torch.autograd.grad``."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self.total, self.formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(run: Callable[[], object]) -> int:
    """Count the floating-point operations of a run's convolutions and matrix products, forward and backward."""
    with _Operations() as counted:
        run()
    return counted.total


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def side_by_side(
    candidates: Mapping[str, Callable[[], object]], baseline: str, rounds: int, title: str
) -> list[Timing]:
    """Run every candidate once per round, after a warm-up round, and compare it with the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    work: dict[str, float] = {}
    with task(title, rounds + 1) as advance:
        for lap in range(rounds + 1):
            for name, run in candidates.items():
                if not lap:
                    work[name] = operations(run)
                    if torch.accelerator.is_available():  # graphs are captured where nobody counts
                        run()
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


Attack = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
BARE, BACKWARD = "bare loop", "bare loop with loss.backward()"


def bare_pgd(settings: BenchSettings, *, whole: bool = False) -> Attack:
    """A plain PGD loop: forward, gradient with respect to the images only, sign, project, clip.

    ``whole`` uses ``loss.backward()`` as public reference code does, which also computes the gradients of the weights.
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
    """Our PGD with the same steps, without early stopping."""
    return PGD(eps=settings.eps, steps=settings.steps, rel_step_size=0.25, early_stop=False)


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


def _in_bfloat16(attack: Callable[..., object], model: nn.Module, *tensors: torch.Tensor) -> object:
    with Victim(model, fast=FastPath(precision="bfloat16")) as victim:
        return attack(victim, *tensors)


def bare_universal(settings: BenchSettings) -> Attack:
    """A plain loop of projected gradient steps on one perturbation for all images, which returns the last."""

    def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        delta = torch.zeros_like(x[:1])
        for _ in range(settings.steps):
            delta = delta.detach().requires_grad_()
            loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
            (gradient,) = torch.autograd.grad(loss, delta)
            moved = delta.detach() + settings.eps / 4 * gradient.sign()
            delta = moved.clamp(-settings.eps, settings.eps)
        return delta

    return attack


def bench_universal(settings: BenchSettings) -> BenchResult:
    """Time a universal perturbation at equal steps: the bare loop, and stochastic PGD, which also scores its result."""
    model, (x, y) = settings.network(), settings.batch()
    names = tuple("0123456789")
    train, others = (Split("random images", images, y, classes=names) for images in (x, 1 - x))
    data = Dataset("random images", train, others, others, classes=names)
    attack = StochasticPGD(
        eps=settings.eps,
        steps=settings.steps,
        batch_size=settings.batch_size,
        probe_starts=0,
        rel_step_size=0.25,
        temperature=1,
    )
    runs: dict[str, Callable[[], object]] = {
        BARE: partial(bare_universal(settings), model, x, y),
        "gambeson": partial(attack.craft, model, data),
    }
    if settings.bfloat16:
        runs["gambeson, bfloat16"] = partial(_in_bfloat16, lambda victim: attack.craft(victim, data), model)
    return BenchResult(
        settings=settings,
        timings=side_by_side(runs, BARE, settings.rounds, "bench universal"),
        peaks=matmul_peaks(settings),
        environment=environment(torch.device(settings.device)),
    )


PLAIN = "plain loop"


def ideal(steps: int) -> float:
    """Expected speed-up: the time of a plain step relative to ours.

    Assumes that a forward, a gradient of the images and one of the weights cost the same, and everything else nothing.

    Args:
        steps: of PGD.
    """
    return 3 * (steps + 1) / (2 * steps + 3)


def bench_training(settings: BenchSettings) -> BenchResult:
    """Time one step of each: the plain loop, ours at sharedness 1 and at the whole batch, and standard training."""
    x, y = settings.batch()
    attack = {"eps": settings.eps, "steps": settings.steps, "rel_step_size": 0.25}
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
    model.to(memory_format=torch.channels_last)  # as in a recipe with channels_last
    batch = Batch(images=x, labels=y, seed=settings.seed)

    def step() -> None:
        losses = defense.losses(model, batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()

    return step


class AuditTiming(Config):
    """An audit's time against what its forwards and backwards cost alone."""

    run: AuditRun
    seconds: float
    """Of the whole audit."""
    stages: dict[str, float]
    """Seconds of each stage."""
    forwards: int
    """Images sent forward by the model under audit."""
    backwards: int
    """Images whose gradient was taken."""
    least: float
    """Seconds of as many forwards and backwards of the plain model, in batches: the limit of any audit that asks as
    much."""
    environment: dict[str, str]


def bench_audit(run: AuditRun, *, batch_size: int = 128, rounds: int = 7) -> AuditTiming:
    """Time an audit, and what it asks of the model by a plain loop beside it.

    Args:
        run: the audit; its files go to a temporary folder.
        batch_size: images per forward of the plain loop.
        rounds: of the plain loop, half before the audit and half after it; medians count.
    """
    subject = load_model(run.model, run.data, run.device, gradients="bench audit")
    model, data = subject.model.eval(), subject.dataset
    x, y = data.train.take(slice(0, batch_size), run.device)
    loss = data.train.task.cross_entropy

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def backward() -> None:
        point = x.clone().requires_grad_()
        torch.autograd.grad(loss(logits_of(model(point), len(x)), y).sum(), point)

    taken: dict[str, list[float]] = {"forward": [], "backward": []}

    def laps(count: int) -> None:
        for _ in range(count):
            for name, job in (("forward", forward), ("backward", backward)):
                _wait()
                began = time.perf_counter()
                job()
                _wait()
                taken[name].append(time.perf_counter() - began)

    for job in (forward, backward):  # warm up
        job()
    laps(rounds - rounds // 2)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = run_audit(run, Path(folder) / "audit").results
        seconds = time.perf_counter() - began
        stages = dict(read_json(Path(folder) / "audit" / "timing.json"))
    laps(rounds // 2)
    one, both = (statistics.median(taken[name]) / len(x) for name in ("forward", "backward"))
    forwards, backwards = found.cost.forwards, found.cost.backwards
    return AuditTiming(
        run=run,
        seconds=seconds,
        stages=dict(sorted(stages.items(), key=lambda stage: -stage[1])),
        forwards=forwards,
        backwards=backwards,
        least=max(0, forwards - backwards) * one + backwards * both,
        environment=environment(torch.device(run.device)),
    )
