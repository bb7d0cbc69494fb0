"""The benchmarks of a visit: attacks, training steps, universal crafting, and profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from visit import Notebook, Peak, Visit, dataset, pace, seconds_of, wait
from visit_training import defenses, recipe

from gambeson import models
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import seeded
from gambeson.studies.bench import BenchResult, BenchSettings, _Operations, bench_attacks, bench_training
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.training.batches import Epoch
from gambeson.training.loop import Run
from gambeson.victim import FastPath, Victim


def run_benchmarks(visit: Visit, book: Notebook) -> None:
    """Time attacks, training steps and universal crafting, recording each immediately; the first batch size first."""
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
        size = f"{batch_size} images"
        book.attempt(f"attacks, {size}", partial(_side_by_side, "attacks", bench_attacks, settings, book), 8)
        book.attempt(f"copies, {size}", partial(_timed_copies, visit, book, batch_size, _copies(visit)), 5)
        book.attempt(f"training, {size}", partial(_side_by_side, "training", bench_training, trained, book), 8)
        if batch_size == visit.bench_batches[0]:
            book.attempt("universal crafting", lambda: _universal(visit, book), 5)
            book.attempt("universal curve", lambda: measure_curve(visit, book), 15)
            if accelerated:
                compiled = {"bfloat16, compiled": FastPath(precision="bfloat16", compile=True)}
                book.attempt("compiled copy", partial(_timed_copies, visit, book, batch_size, compiled), 25)
            book.attempt("profiles", lambda: _profiles(visit, book), 8)


def _side_by_side(
    name: str, bench: Callable[[BenchSettings], BenchResult], settings: BenchSettings, book: Notebook
) -> None:
    with Peak() as peak:
        result = bench(settings)
    for timing in result.timings:
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
            **pace(book, timing.work, timing.seconds),
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
    model, x, y = _network(visit)
    forward, backward = count_operations(model, x, y)
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
            book.note(
                "universal",
                name=name,
                copy=kind,
                seconds=seconds,
                gradients_a_second=found["backwards"] / seconds,
                peak_gib=peak.gib,
                **found,
                **pace(book, found["forwards"] * forward + found["backwards"] * backward, seconds),
            )


def measure_curve(visit: Visit, book: Notebook) -> None:
    """Time universal perturbations at five eps, one after another and together, on a network with random weights."""
    data, (model, _, _) = dataset(visit), _network(visit)
    radii = [visit.eps * share / 4 for share in range(1, 6)]
    small = {"probe_starts": 2, "probe_start_steps": 2, "steps": 2} if not visit.low else {}
    attack = StochasticPGD(eps=visit.eps, **small)
    for name in ("one after another", "together"):
        found: dict[str, Any] = {}

        def craft(victim: Victim, name: str = name, found: dict[str, Any] = found) -> None:
            before = victim.backwards
            if name == "together":
                attack.craft_curve(victim, data, radii)
            else:
                start = None
                for eps in radii:
                    start = attack.model_copy(update={"eps": eps}).craft(victim, data, start=start).delta
            found["backwards"] = victim.backwards - before

        with Peak() as peak, Victim(model, fast=FastPath(precision=visit.precision)) as victim:
            seconds = seconds_of(partial(craft, victim), 1, 0)
        book.note("curve", name=name, eps=radii, seconds=seconds, peak_gib=peak.gib, **found)


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


def _timed_copies(visit: Visit, book: Notebook, batch_size: int, copies: Mapping[str, FastPath | None]) -> None:
    """Time PGD-10; the first call is apart, because it folds, compiles and captures."""
    model, x, y = _network(visit)
    x, y = x[:batch_size], y[:batch_size]
    forward, backward = count_operations(model, x, y)
    attack = PGD(eps=visit.eps, steps=10, early_stop=False)
    for kind, fast in copies.items():
        with Victim(model, fast=fast or False) as victim, Peak() as peak:
            job = partial(attack, victim, x, y)
            first = seconds_of(job, 1, 0)
            before = victim.forwards, victim.backwards
            seconds = seconds_of(job, 4, 1)
            work = (victim.forwards - before[0]) / 5 * forward + (victim.backwards - before[1]) / 5 * backward
            notes = victim.notes
        book.note(
            "attack",
            batch_size=len(x),
            copy=kind,
            notes=notes,
            first_seconds=first,
            seconds=seconds,
            images_a_second=len(x) / seconds,
            peak_gib=peak.gib,
            **pace(book, work, seconds),
        )


def count_operations(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, task: Task = CLASSIFICATION
) -> tuple[float, float]:
    """Operations of a forward of one image, and of the backward to it, counted."""
    with Victim(model) as victim, torch.enable_grad():
        point = x.clone().requires_grad_()
        with _Operations() as forward:
            loss = task.cross_entropy(victim(point), y).sum()
        with _Operations() as backward:
            victim.gradient(loss, point, len(x))
    return forward.total / len(x), backward.total / len(x)
