"""The benchmarks of a visit: attacks, training steps, universal crafting, and profiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gambeson import models
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import seeded
from gambeson.studies.bench import BenchResult, BenchSettings, bench_attacks, bench_training
from gambeson.studies.visit import Notebook, Peak, Visit, dataset, peaks_of, seconds_of, wait
from gambeson.studies.visit_training import defenses, recipe
from gambeson.training.batches import Epoch
from gambeson.training.loop import Run
from gambeson.victim import FastPath, Victim


def run_benchmarks(visit: Visit, book: Notebook) -> None:
    """Time attacks, training steps and universal crafting, recording each immediately."""
    accelerated = torch.device(visit.device).type != "cpu"
    for batch_size in visit.bench_batches:
        settings = BenchSettings(
            model=visit.model,
            batch_size=batch_size,
            rounds=visit.rounds,
            bfloat16=visit.low,
            device=visit.device,
            **({} if accelerated else {"channels": 1, "image_size": 8, "steps": 1}),
        )
        trained = settings.model_copy(update={"steps": visit.craft_steps})
        book.attempt(
            f"attacks, {batch_size} images", partial(_side_by_side, "attacks", bench_attacks, settings, book), 8
        )
        book.attempt(
            f"training, {batch_size} images", partial(_side_by_side, "training", bench_training, trained, book), 8
        )
        if batch_size == visit.bench_batches[0]:
            book.attempt("profiles", lambda: _profiles(visit, book), 8)
        if accelerated:
            book.attempt(f"copies, {batch_size} images", partial(_timed_copies, visit, book, "default", batch_size), 5)
    book.attempt("universal crafting", lambda: _universal(visit, book), 5)
    if accelerated:
        book.attempt("compiled copy", lambda: _compiled(visit, book), 40)
        book.attempt("convolutions chosen by trial", lambda: _by_trial(visit, book), 8)


def _side_by_side(
    name: str, bench: Callable[[BenchSettings], BenchResult], settings: BenchSettings, book: Notebook
) -> None:
    with Peak() as peak:
        result = bench(settings)
    rates = peaks_of(book)
    for timing in result.timings:
        rate = timing.work / timing.seconds
        book.note(
            "bench",
            bench=name,
            model=settings.model,
            batch_size=settings.batch_size,
            steps=settings.steps,
            name=timing.name,
            seconds=timing.seconds,
            images_a_second=result.images_a_second(timing),
            ratio=[timing.ratio, timing.ratio_low, timing.ratio_high],
            flops=rate,
            share_of_peak={kind: round(rate / reached, 4) for kind, reached in rates.items()},
            peak_gib_of_all=peak.gib,
        )


def _network(visit: Visit) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    data = dataset(visit)
    with seeded(visit.seed, "visit"):
        model = models.create(visit.model, data).to(visit.device).eval()
    x, y = data.train.take(slice(0, min(visit.batch_size, len(data.train))), visit.device)
    return model, x, y


def _universal(visit: Visit, book: Notebook) -> None:
    """Time universal crafting on a network with random weights, which does not affect the time."""
    data = dataset(visit)
    model, *_ = _network(visit)
    small = {"probe_start_steps": 2, "steps": 2} if not visit.low else {}
    restarts = {"probe_starts": 0, "steps": visit.uap_steps, "batch_size": visit.uap_batch, "restarts": 2}
    for name, settings in (("default", small), ("two restarts", restarts)):
        attack = StochasticPGD(eps=visit.eps, **settings)
        for kind, fast in _copies(visit).items():
            if (name, kind) == ("default", "model itself") or (name != "default" and "without" in kind):
                continue  # the slowest, and no more than the others say
            found: dict[str, Any] = {}

            def craft(
                attack: StochasticPGD = attack, fast: FastPath | None = fast, found: dict[str, Any] = found
            ) -> None:
                with Victim(model, fast=fast or False) as victim:
                    made = attack.craft(victim, data).about
                found.update(forwards=made.forwards, backwards=made.backwards)

            with Peak() as peak:
                seconds = seconds_of(craft, 1, 0)
            rate = found["backwards"] / seconds
            book.note(
                "universal", name=name, copy=kind, seconds=seconds, gradients_a_second=rate, peak_gib=peak.gib, **found
            )


def _copies(visit: Visit) -> dict[str, FastPath | None]:
    found: dict[str, FastPath | None] = {"model itself": None, "float32": FastPath()}
    if visit.low:
        found["bfloat16"] = FastPath(precision="bfloat16")
        found["bfloat16 without graphs"] = FastPath(precision="bfloat16", graphs=False)
    return found


def _profiles(visit: Visit, book: Notebook) -> None:
    """Profile an attack of ten steps, and a step of PGD adversarial training."""
    model, x, y = _network(visit)
    attack = PGD(eps=visit.eps, steps=10, early_stop=False)
    for kind, fast in _copies(visit).items():
        with Victim(model, fast=fast or False) as victim:
            _profile(f"PGD-10, {kind}", lambda victim=victim: attack(victim, x, y), book)  # type: ignore[misc]
    data = dataset(visit)
    how, defense = recipe(visit, 2), defenses(visit)["pgd-adversarial"]
    run = Run(model, data, defense, how, visit.seed, None)
    batch = Epoch(run.train, how, 1, visit.seed, 0, run.device)[0]
    model.train()
    _profile("a step of pgd-adversarial", lambda: run.train_step(batch), book)


def _profile(name: str, job: Callable[[], object], book: Notebook) -> None:
    """Record the kernels of a job and their time, the wall time, and how often the host waits."""
    from torch.profiler import ProfilerActivity, profile

    plain = seconds_of(job, 3, 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        job()
        wait()
    events = seen.key_averages()
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    waits = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense"}
    book.note(
        "profile",
        name=name,
        seconds=plain,
        kernel_seconds=sum(event.self_device_time_total for event in kernels) / 1e6,
        kernels=sum(event.count for event in kernels),
        waits={event.key: event.count for event in events if event.key in waits},
        longest=[
            [event.key[:80], event.count, round(event.self_device_time_total / 1e3, 2)]
            for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]
        ],
    )


@contextlib.contextmanager
def _trying() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _by_trial(visit: Visit, book: Notebook) -> None:
    """Measure the effect of benchmarking convolution algorithms."""
    with _trying():
        _timed_copies(visit, book, "by trial", visit.batch_size)


def _compiled(visit: Visit, book: Notebook) -> None:
    compiled: dict[str, FastPath | None] = {"bfloat16, compiled": FastPath(precision="bfloat16", compile=True)}
    _timed_copies(visit, book, "compiled", visit.batch_size, compiled)


def _timed_copies(
    visit: Visit, book: Notebook, name: str, batch_size: int, copies: dict[str, FastPath | None] | None = None
) -> None:
    model, x, y = _network(visit)
    x, y = x[:batch_size], y[:batch_size]
    attack = PGD(eps=visit.eps, steps=10, early_stop=False)
    for kind, fast in (_copies(visit) if copies is None else copies).items():
        with Victim(model, fast=fast or False) as victim, Peak() as peak:
            seconds = seconds_of(lambda victim=victim: attack(victim, x, y), 3, 2)  # type: ignore[misc]
            notes = victim.notes
        book.note(
            "attack",
            setting=name,
            batch_size=len(x),
            copy=kind,
            notes=notes,
            seconds=seconds,
            images_a_second=len(x) / seconds,
            peak_gib=peak.gib,
        )
