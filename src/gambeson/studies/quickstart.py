"""The quickstart: break a model with one perturbation, harden it in two ways, audit all three."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from gambeson import data, models
from gambeson.attacks import StochasticPGD, UniversalPerturbation
from gambeson.auditing import SUITES, Audit, AuditRun, Suite, run_audit
from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.examples import FILE, save_examples
from gambeson.base import task
from gambeson.defenses import Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.evaluation import Rate
from gambeson.evaluation.universal import error_rate
from gambeson.training import Recipe, TrainRun, run_training
from gambeson.victim import Victim, predict, score

DATA, MODEL, EPS = "mnist5k", "lenet5", 0.2

BASELINE = "standard"
DEFENSES: dict[str, Defense] = {
    BASELINE: Standard(),
    "pgd-adversarial": PGDAdversarial(eps=EPS),
    "shared-adversarial": SharedAdversarial(eps=EPS, sharedness=64, sigma=0.7),
}
TRAIN = Recipe(epochs=12, lr=0.05, warmup=1)
HARDEN = Recipe(epochs=8, lr=0.05, warmup=1)
SUITE = Suite(
    eps=(0.1, 0.2, 0.25, 0.3, 0.4),
    universal_steps=200,
    universal_restarts=1,
    universal_batch=32,
    universal_probe_starts=3,
    pgd_steps=20,
    pgd_restarts=1,
    suite_images=100,
    suite_queries=1000,
    sample=100,
    queries=200,
    surrogate_epochs=6,
    transfer_images=500,
    noise_sizes=(1.0, 3.0),
    edits=SUITES["quick"].edits,
    edit_images=500,
    jacobian_backwards=2000,
    eps_uni_tolerance=0.05,
    eps_uni_runs=2,
)
LOOK = StochasticPGD(eps=0.25, steps=100, probe_starts=4)
"""The attack of the first look, shorter than the audits'."""


class FirstLook(NamedTuple):
    """What one perturbation does to the first model, long before that is audited."""

    examples: Path
    """The file of :func:`gambeson.auditing.stages.examples.save_examples`."""
    uap: UniversalPerturbation
    under: Rate
    """Error under it."""
    clean: Rate
    """Error on clean images."""
    classes: tuple[str, ...]


def quickstart(
    out: Path, seed: int = 0, device: str = "cpu", *, started: Callable[[FirstLook], None] | None = None
) -> list[Audit]:
    """Train LeNet-5 on 3,500 digits, harden the trained net in two ways, and audit all three on 1,000 other digits.

    Hardening starts from the standard network: this small network often fails to learn with perturbations of this size
    from the first step on. The audits share one surrogate. On a processor the parts run beside each other, each on one
    thread, so that the numbers do not depend on the number of cores.

    Args:
        out: folder with a run folder and an audit folder per model; what is finished is not repeated.
        seed: of everything.
        device: of the computations.
        started: called with the first look, unless all audits are finished already.

    Returns:
        The audits, in the order of :data:`DEFENSES`.
    """
    processes = min(len(DEFENSES), os.cpu_count() or 1) if device == "cpu" else 1
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(device,))
    with pool, task("quickstart", 2 * len(DEFENSES) + 1) as advance:

        def begin(work: Callable[..., None], name: str = BASELINE) -> Future[None]:
            future = pool.submit(work, out, name, seed, device)
            future.add_done_callback(lambda _: advance())
            return future

        begin(_train).result()
        shared = begin(_surrogate)
        if started is not None and not all((out / f"{name}-audit" / "result.json").is_file() for name in DEFENSES):
            started(pool.submit(_first_look, out, seed, device).result())
        shared.result()
        audits = [begin(_audit)]
        for name, training in [(name, begin(_train, name)) for name in DEFENSES if name != BASELINE]:
            training.result()
            audits.append(begin(_audit, name))
        for audit in audits:
            audit.result()
    return [run_audit(_plan(out, name, seed, device), out / f"{name}-audit") for name in DEFENSES]


def _begin(device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the processes without a traceback each
    if device == "cpu":
        torch.set_num_threads(1)


@cache
def _data() -> data.Dataset:
    return data.load(DATA)


def _train(out: Path, name: str, seed: int, device: str) -> None:
    fresh = name == BASELINE
    run = TrainRun(
        data=DATA,
        model=MODEL,
        defense=DEFENSES[name],
        recipe=TRAIN if fresh else HARDEN,
        init=None if fresh else str(out / BASELINE),
        seed=seed,
        device=device,
    )
    run_training(run, out / name, _data())


def _first_look(out: Path, seed: int, device: str) -> FirstLook:
    with Victim(models.load(out / BASELINE).to(torch.device(device))) as victim:
        uap = LOOK.craft(victim, _data(), seed=seed)
        test = uap.held_out(_data().test)
        clean, under = (predict(victim, test, delta) for delta in (None, uap.delta.to(victim.device)))
        save_examples(out / BASELINE, victim, test, uap, clean != test.labels, under != test.labels)
    rates = [error_rate(score(found, test)) for found in (under, clean)]
    return FirstLook(out / BASELINE / FILE, uap, rates[0], rates[1], test.classes)


def _surrogate(out: Path, name: str, seed: int, device: str) -> None:
    """Train the surrogate that all audits share."""
    file = _surrogate_file(out)
    if not file.is_file():
        model, _ = surrogate.train_surrogate(MODEL, SUITE, _data(), torch.device(device), seed)
        models.save(model, file)


def _surrogate_file(out: Path) -> Path:
    return out / "surrogate.safetensors"


def _plan(out: Path, name: str, seed: int, device: str) -> AuditRun:
    suite = SUITE.model_copy(update={"surrogate": str(_surrogate_file(out))})
    return AuditRun(model=str(out / name), data=DATA, suite=suite, seed=seed, device=device)


def _audit(out: Path, name: str, seed: int, device: str) -> None:
    run_audit(_plan(out, name, seed, device), out / f"{name}-audit", _data())
