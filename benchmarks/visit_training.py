"""The trainings of a visit: one defence after another, each audited immediately, as far as time allows."""

from __future__ import annotations

import time
from typing import Any

import torch
from visit import Notebook, Peak, Visit, dataset, free, pace, seconds_of

from gambeson import models
from gambeson.attacks import PGD, StochasticPGD
from gambeson.auditing import audit
from gambeson.base import full_precision, seeded
from gambeson.data import Dataset
from gambeson.defenses import (
    Defense,
    Jacobian,
    Learn2Perturb,
    PGDAdversarial,
    SharedAdversarial,
    Standard,
    UniversalConsistency,
)
from gambeson.evaluation import accuracy, accuracy_under, universal_evasion
from gambeson.evaluation.universal import control_rates
from gambeson.models import PixelModel
from gambeson.studies.bench import _Operations
from gambeson.threat import Ball
from gambeson.training import Recipe, train
from gambeson.training.batches import Epoch
from gambeson.training.loop import Run
from gambeson.victim import FastPath, Victim

SLACK = 1.15
"""Safety factor on the measured time of trainings and audits."""
FIRST_AUDIT = 18.0
"""Expected duration of the first audit on an accelerator, in seconds."""


def defenses(visit: Visit) -> dict[str, Defense]:
    """The defences, in order of importance."""
    attack: dict[str, Any] = {"eps": visit.eps, "craft_precision": visit.precision}
    return {
        "standard": Standard(),
        "pgd-adversarial": PGDAdversarial(steps=visit.craft_steps, rel_step_size=0.25, **attack),
        "shared-adversarial 64": SharedAdversarial(sharedness=64, **attack),
        "universal-consistency": UniversalConsistency(eps=visit.eps),
        "jacobian": Jacobian(strength=0.01),
        "shared-adversarial 8": SharedAdversarial(sharedness=8, **attack),
        "shared-adversarial 1": SharedAdversarial(sharedness=1, **attack),
        "jacobian 0.001": Jacobian(strength=0.001),
        "learn2perturb": Learn2Perturb(eps=visit.eps, steps=visit.craft_steps),
    }


def recipe(visit: Visit, epochs: int) -> Recipe:
    """The common recipe: SGD with a cosine schedule, in low precision."""
    return Recipe(
        epochs=epochs,
        batch_size=visit.batch_size,
        lr=visit.lr,
        nesterov=True,
        warmup=min(1.0, epochs / 4),
        augment="crop-flip" if visit.low else "none",
        precision="bfloat16" if visit.low else "float32",
        channels_last=True,
    )


def run_trainings(visit: Visit, book: Notebook, done: list[dict[str, Any]], only: list[str]) -> None:
    """Train and audit one defence after another until time is up, recording each number immediately.

    Args:
        visit: the settings.
        book: the notebook.
        done: notes of earlier visits: trainings with the same data size and seed are skipped.
        only: names of defences in order, ``NAME@SEED`` for a run with this seed alone; empty: all.
    """
    data, known = dataset(visit), defenses(visit)
    entries = [entry.partition("@") for entry in only or known]
    chosen = {name: known[name] for name, _, _ in entries}
    finished = {
        (line["defense"], line["seed"], line["data"], line["model"])
        for line in done + book.lines()
        if line["kind"] == "audited"
    }
    rounds = range(visit.seed, visit.seed + visit.seeds)
    jobs = [
        (name, int(fixed or seed))
        for seed in rounds
        for name, _, fixed in entries
        if not fixed or seed == visit.seed  # a fixed seed is run in the first round
    ]
    jobs = [job for job in dict.fromkeys(jobs) if (*job, data.name, visit.model) not in finished]
    epoch: dict[str, float] = {}
    for name, defense in chosen.items():
        book.attempt(f"step of {name}", lambda n=name, d=defense: epoch.update({n: _step(visit, data, n, d, book)}))  # type: ignore[misc]
    jobs = [job for job in jobs if job[0] in epoch]
    first = [job for job in jobs if job[1] == visit.seed] or jobs
    auditing = FIRST_AUDIT if visit.low else 0.0
    epochs = choose_epochs([epoch[name] for name, _ in first], auditing, book.left, visit.epochs)
    book.note("plan", epochs=epochs, seconds_per_epoch=epoch, jobs=[list(job) for job in jobs], images=len(data.train))
    kept: list[PixelModel] = []
    for name, seed in jobs:
        reserved = visit.judging if kept else 0.0
        fits = int((book.left - reserved - auditing) / (SLACK * epoch[name]))
        mine = min(epochs, fits)
        if mine < min(visit.epochs[0], epochs):
            book.note("skipped", name=name, seed=seed, left=round(book.left, 1))
            continue
        began: dict[str, float] = {}

        def job(name: str = name, seed: int = seed, mine: int = mine, began: dict[str, float] = began) -> None:
            model = _train(visit, data, name, chosen[name], seed, mine, book)
            began["audit"] = time.monotonic()
            with full_precision(torch.device(visit.device)):
                _audit(visit, data, name, seed, mine, model, book)
            began["end"] = time.monotonic()
            if name == visit.judged and not kept:
                kept.append(model)

        if book.attempt(f"{name}, seed {seed}", job):
            auditing = max(1.0, SLACK * (began["end"] - began["audit"]))
    for model in kept:
        book.attempt(f"audit {visit.suite}", lambda model=model: _judge(visit, data, model, book), visit.judging / 2)  # type: ignore[misc]


def choose_epochs(seconds: list[float], audit: float, left: float, limits: tuple[int, int]) -> int:
    """Return the largest number of epochs at which the maximum number of runs fits the remaining time.

    Args:
        seconds: per epoch of each run, in order.
        audit: seconds of an audit, one after every run.
        left: seconds left.
        limits: minimum and maximum epochs.
    """
    fewest, most = limits
    for count in range(len(seconds), 0, -1):
        room = left - count * audit
        fits = int(room / (SLACK * sum(seconds[:count])))
        if fits >= fewest:
            return min(most, fits)
    return fewest


def _create(visit: Visit, data: Dataset, seed: int) -> PixelModel:
    with seeded(seed, "model"):
        return models.create(visit.model, data).to(visit.device)


def _step(visit: Visit, data: Dataset, name: str, defense: Defense, book: Notebook) -> float:
    """Measure a training step of this defence; return the seconds per epoch."""
    how = recipe(visit, visit.epochs[1])
    run = Run(_create(visit, data, visit.seed), data, defense, how, visit.seed, None)
    batches = Epoch(run.train, how, defense.num_orders, visit.seed, how.epochs - 1, run.device)
    run.model.train()
    numbers = iter(range(10**9))

    def one() -> None:
        run.train_step(batches[next(numbers) % len(batches)])

    with seeded(visit.seed, "visit"), Peak() as peak:
        one()
        with _Operations() as counted:
            one()
        seconds = seconds_of(one, 6 if visit.low else 1, 2 if visit.low else 0)
    book.note(
        "step",
        defense=name,
        batch_size=visit.batch_size,
        seconds=seconds,
        images_a_second=visit.batch_size / seconds,
        **pace(book, counted.total, seconds),
        peak_gib=peak.gib,
        seconds_per_epoch=seconds * run.steps,
    )
    return seconds * run.steps


def _train(
    visit: Visit, data: Dataset, name: str, defense: Defense, seed: int, epochs: int, book: Notebook
) -> PixelModel:
    model = _create(visit, data, seed)
    began = time.monotonic()
    with Peak() as peak:
        history = train(model, data, defense, recipe=recipe(visit, epochs), seed=seed, label=f"train {name}")
    book.note(
        "trained",
        defense=name,
        settings=defense.plain(),
        seed=seed,
        epochs=epochs,
        seconds=round(time.monotonic() - began, 2),
        peak_gib=peak.gib,
        history=[{key: round(value, 5) for key, value in entry.items()} for entry in history],
    )
    free()
    return model.eval()


def _judge(visit: Visit, data: Dataset, model: PixelModel, book: Notebook) -> None:
    """Time an audit of a trained model, and record its verdict; what is done in time is in its folder."""
    began = time.monotonic()
    with Peak() as peak:
        found = audit(model, data, visit.suite, book.path.parent / "audit", seed=visit.seed, label=visit.judged)
    seconds = time.monotonic() - began
    verdict = found.verdict.plain()
    book.note("audit", suite=visit.suite, defense=visit.judged, seconds=seconds, peak_gib=peak.gib, verdict=verdict)


def _audit(visit: Visit, data: Dataset, name: str, seed: int, epochs: int, model: PixelModel, book: Notebook) -> None:
    """Clean accuracy, accuracy under PGD, and UER and controls for each eps, scored in full float32."""
    about = {"defense": name, "seed": seed, "epochs": epochs, "data": data.name, "model": visit.model}
    test = data.test.to(visit.device)
    fast = FastPath(precision=visit.precision)
    clean = accuracy(model, test)
    book.note("clean", accuracy=clean.plain(), **about)
    found: dict[str, Any] = {"clean": clean.value}
    few = test.subset(torch.arange(min(visit.pgd_images, len(test))))
    began = time.monotonic()
    with Victim(model, fast=fast) as victim:
        robust = accuracy_under(victim, few, PGD(eps=visit.eps, steps=visit.pgd_steps), seed, 500)
    seconds = round(time.monotonic() - began, 2)
    book.note("pgd", eps=visit.eps, steps=visit.pgd_steps, accuracy=robust.plain(), seconds=seconds, **about)
    found["pgd"] = robust.value
    for eps in visit.audited:
        began = time.monotonic()
        attack = StochasticPGD(eps=eps, probe_starts=0, steps=visit.uap_steps, batch_size=visit.uap_batch, restarts=2)
        with Victim(model, fast=fast) as victim:
            uap = attack.craft(victim, data, seed=seed)
        crafted = round(time.monotonic() - began, 2)
        rate = universal_evasion(model, test, uap)
        with Victim(model) as victim:
            controls = control_rates(victim, test, Ball(eps=eps), seed)
        book.note(
            "uer",
            eps=eps,
            uer=rate.plain(),
            controls=[one.plain() for one in controls],
            restarts=uap.about.restarts,
            crafting_seconds=crafted,
            **about,
        )
        found[f"uer {255 * eps:.3g}/255"] = rate.value
        found[f"controls {255 * eps:.3g}/255"] = max(one.worst.value for one in controls)
    book.note("audited", found=found, **about)
