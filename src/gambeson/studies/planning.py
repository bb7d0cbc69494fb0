"""What a study will take, before anything of it runs: the cost of each kind of cell, measured on this machine."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gambeson import models
from gambeson.auditing import cost as audit_cost
from gambeson.auditing.suite import SUITES
from gambeson.base import Config, UserError, seeded, task, write_json
from gambeson.data import Dataset
from gambeson.studies.audits import AuditMeasure
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.measures import AttackMeasure, EpsUniMeasure, SuiteMeasure
from gambeson.studies.runner import load
from gambeson.studies.store import PLAN, Damaged, Estimates, Store, key_of
from gambeson.training import TrainRun, plan_training
from gambeson.victim import DEFAULT_VOTES, EOT_SAMPLES

DEVICES = (1, 8, 64)
OVERHEAD = 0.5
"""Seconds added to every cell: loading, and what is not counted (ours)."""


class KindPlan(Config):
    """What one kind of cell takes on this machine."""

    name: str
    cells: int
    done: int
    seconds: float | None
    """Of one, the mean."""
    measured: bool
    """Whether finished cells say so; else it is an estimate from a few timed steps and batches."""


class StudyPlan(Config):
    """What a study takes."""

    study: str
    device: str
    cells: int
    done: int
    kinds: list[KindPlan]
    seconds: dict[int, float]
    """Time for what is left on so many devices like this one, in which dependencies are kept."""
    warnings: list[str]


def plan(matrix: Matrix, store: Store, device: str) -> StudyPlan:
    """Measure what a study will take on this machine; only ``plan.json`` is written.

    A few steps of each training are timed, and a few batches of each network; what attacks take is counted in images.

    Raises:
        UserError: a defence, a network and data do not fit each other.
    """
    estimates = Estimates(matrix, store, device)
    left = [cell for cell in matrix.cells if not _done(store, cell)]
    seconds, notes = dict(estimates.planned), list[str]()
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in left:
        if not estimates.measured(cell):
            groups.setdefault((cell.row.data, cell.row.model, cell.row.defense), []).append(cell)
    with task("timing", len(groups)) as advance:
        for cells in groups.values():
            try:
                seconds |= _timed(cells, matrix, device)
            except UserError as error:
                notes.append(f"{cells[0].row.title}: {error}")
            advance()
    write_json(store.root / matrix.study.name / PLAN, {"device": device, "seconds": seconds})
    estimates = Estimates(matrix, store, device)
    return StudyPlan(
        study=matrix.study.name,
        device=device,
        cells=len(matrix.cells),
        done=len(matrix.cells) - len(left),
        kinds=_kinds(matrix, estimates, left),
        seconds={count: makespan(left, estimates.of, count) for count in DEVICES},
        warnings=notes,
    )


def _done(store: Store, cell: Cell) -> bool:
    try:
        return store.read(cell) is not None
    except Damaged:
        return False


def _kinds(matrix: Matrix, estimates: Estimates, left: Sequence[Cell]) -> list[KindPlan]:
    missing, found = {cell.address for cell in left}, dict[str, list[Cell]]()
    for cell in matrix.cells:
        found.setdefault(cell.label or cell.kind, []).append(cell)
    plans = []
    for name, cells in found.items():
        known = [value for cell in cells if (value := estimates.of(cell)) is not None]
        plans.append(
            KindPlan(
                name=name,
                cells=len(cells),
                done=sum(cell.address not in missing for cell in cells),
                seconds=statistics.fmean(known) if known else None,
                measured=all(estimates.measured(cell) for cell in cells),
            )
        )
    return plans


def makespan(cells: Sequence[Cell], seconds: Callable[[Cell], float | None], devices: int) -> float:
    """Return the time for some cells on so many devices: whoever is free takes the first cell that is ready.

    Args:
        cells: in the order of work; what they need and is not among them is there.
        seconds: of each; None counts as nothing.
        devices: their number.
    """
    addresses = {cell.address for cell in cells}
    waiting = {cell.address: {need.address for need in cell.needs} & addresses for cell in cells}
    users: dict[str, list[int]] = {}
    for place, cell in enumerate(cells):
        for need in waiting[cell.address]:
            users.setdefault(need, []).append(place)
    ready = [place for place, cell in enumerate(cells) if not waiting[cell.address]]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < devices:
            place = heapq.heappop(ready)
            heapq.heappush(running, (now + (seconds(cells[place]) or 0.0), place))
        now, place = heapq.heappop(running)
        for user in users.get(cells[place].address, ()):
            waiting[cells[user].address].discard(cells[place].address)
            if not waiting[cells[user].address]:
                heapq.heappush(ready, user)
    return now


def _timed(cells: Sequence[Cell], matrix: Matrix, device: str) -> dict[str, float]:
    """Seconds of each key of cells that share data, architecture and defence."""
    trainings = [one for cell in cells for one in (cell, *cell.needs) if one.kind != "measure"]
    train = next(one for one in trainings if one.row.defense == cells[0].row.defense)
    run, data = TrainRun(**train.settings["run"], device=device), load(train.settings["data"])
    epoch = plan_training(run, data).seconds / run.recipe.epochs
    prices = _Prices(run, data, device)
    reference: float | None = None
    found = {}
    for cell in cells:
        key = key_of(cell)
        if key in found:
            continue
        epochs = float(run.recipe.epochs)
        if cell.kind == "measure":
            found[key] = OVERHEAD + prices.seconds(cell.measure)
        elif cell.kind == "cost":
            found[key] = OVERHEAD + 40 * epoch / max(1, len(data.train) // run.recipe.batch_size)
        elif cell.kind == "search":
            search = cell.settings["search"]
            count = len(search["lr"]) * len(search["warmup"])
            found[key] = OVERHEAD + epoch * (count * (search["epochs"] or epochs) + sum(search["lengths"]))
        elif "epochs of" in cell.settings:
            if reference is None:
                theirs = TrainRun(**cell.needs[-1].settings["run"], device=device)
                reference = plan_training(theirs, data).seconds
            found[key] = OVERHEAD + reference
        else:
            found[key] = OVERHEAD + epoch * epochs
    return found


class _Prices:
    """Times of one image forward and of one gradient, on an untrained network with the noise of its defence."""

    def __init__(self, run: TrainRun, data: Dataset, device: str) -> None:
        with seeded(0, "plan"):
            model: Any = models.create(run.model, data, members=run.defense.num_members)
            run.defense.configure_model(model.to(torch.device(device)))
        self.model, self.data = model, data
        timed = audit_cost.plan(model, data, SUITES["quick"].model_copy(update={"surrogate": "none"}))
        self.forward, self.gradient = timed.speed.forward, timed.speed.gradient

    def seconds(self, measure: Any) -> float:
        """Seconds of a measurement, at the most."""
        forwards, gradients = self._images(measure)
        return float(forwards * self.forward + gradients * self.gradient)

    def _images(self, measure: Any) -> tuple[int, int]:
        """Images that a measurement sends forward, and gradients of images that it takes, at the most."""
        data, random = self.data, bool(models.injections(self.model))
        votes, draws = (DEFAULT_VOTES, EOT_SAMPLES) if random else (1, 1)
        if isinstance(measure, AuditMeasure):
            suite = measure.suite if measure.suite.eps else measure.suite.model_copy(update={"eps": (0.1, 0.2, 0.3)})
            parts = audit_cost.plan(self.model, data, suite).parts
            return sum(part.forwards for part in parts), sum(part.gradients for part in parts)
        if isinstance(measure, EpsUniMeasure):  # eight perturbations (ours), each of which begins at the last one too
            runs = 8 * (measure.restarts + 1)
            return runs * votes * (len(data.validation) + len(data.test)), runs * measure.steps * 64
        few = min(getattr(measure, "test_images", len(data.test)), len(data.test))
        if isinstance(measure, SuiteMeasure):  # as if no image were broken by a cheaper attack
            return few * measure.queries * votes, few * audit_cost.SUITE_GRADIENTS * draws
        if not isinstance(measure, AttackMeasure):
            return few * votes, 0
        attack, members = measure.build(0.1), len(self.model.voters)
        sources = 2 * members + 3 if measure.adaptive and members > 1 else 1
        steps = sources * getattr(attack, "steps", 10) * getattr(attack, "restarts", 1)
        if hasattr(attack, "craft"):
            held = votes * (len(data.test) + sources * len(data.validation))
            return held, steps * getattr(attack, "batch_size", 64)
        return few * (sources + 1) * votes, few * steps * draws
