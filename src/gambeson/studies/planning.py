"""What a study will take, before anything of it runs: the cost of each kind of cell, measured on this machine."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gambeson import models
from gambeson.auditing import cost as audit_cost
from gambeson.auditing.suite import SUITES
from gambeson.base import Config, UserError, seeded, task, write_json
from gambeson.data import Dataset, catalog
from gambeson.data.load import TORCHVISION
from gambeson.defenses import Standard
from gambeson.studies.audits import AuditMeasure
from gambeson.studies.bench import operations
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.measures import AttackMeasure, EpsUniMeasure, JacobianMeasure, SuiteMeasure
from gambeson.studies.runner import load
from gambeson.studies.store import PLAN, Damaged, Estimates, Planned, Store, key_of
from gambeson.training import TrainRun, plan_training
from gambeson.training.run import step_of
from gambeson.victim import DEFAULT_VOTES, EOT_SAMPLES

DEVICES = (1, 8, 64)
LONG = 1.0
"""Seconds of a step from which on it is counted and not timed."""
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
    """Whether finished cells say so; else it is an estimate from a few timed steps and batches, or from counting."""


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
    Where a step takes long, such as that of a large network without an accelerator, its operations are counted instead.

    Raises:
        UserError: a defence, a network and data do not fit each other, so that nothing can run. That a data set is yet
            to be downloaded, or that a part cannot run, is a warning.
    """
    estimates = Estimates(matrix, store, device)
    left = [cell for cell in matrix.cells if not _done(store, cell)]
    seconds, notes = dict(estimates.planned), dict[str, str]()
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in left:
        if not estimates.measured(cell):
            groups.setdefault((cell.row.data, cell.row.model, cell.row.defense), []).append(cell)
    prices = _Prices(device)
    with task("timing", len(groups)) as advance:
        for cells in groups.values():
            try:
                seconds |= _timed(cells, device, prices)
            except UserError as error:
                notes.setdefault(str(error), f"{cells[0].row.title}: {error}")
            advance()
    known = any(key_of(cell) in seconds or estimates.measured(cell) for cell in left)
    if notes and not known and all(_is_here(one.name) for one in matrix.study.data):
        raise UserError(f"nothing that is left of the study can run: {next(iter(notes.values()))}")
    write_json(store.root / matrix.study.name / PLAN, Planned(device=device, seconds=seconds).plain())
    estimates = Estimates(matrix, store, device)
    return StudyPlan(
        study=matrix.study.name,
        device=device,
        cells=len(matrix.cells),
        done=len(matrix.cells) - len(left),
        kinds=_kinds(matrix, estimates, left),
        seconds={count: makespan(left, estimates.of, count) for count in DEVICES},
        warnings=list(notes.values()),
    )


def _is_here(name: str) -> bool:
    """Whether data are on this machine, and need no download."""
    return all(entry.ready for entry in catalog() if entry.name == name) and not name.startswith(TORCHVISION)


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


def _timed(cells: Sequence[Cell], device: str, prices: _Prices) -> dict[str, float]:
    """Seconds of each key of cells that share data, architecture and defence."""
    trainings = [one for cell in cells for one in (cell, *cell.needs) if one.kind != "measure"]
    train = next(one for one in trainings if one.row.defense == cells[0].row.defense)
    run, data = TrainRun(**train.settings["run"], device=device), load(cells[0])
    members, step, random = run.defense.num_members, prices.step(run, data), prices.noisy(run, data)

    def epoch(settings: Mapping[str, Any]) -> float:
        images = min(len(data.train), settings["data"]["train"] or len(data.train))
        return step * max(1, images // run.recipe.batch_size)

    found = {}
    for cell in cells:
        key, epochs = key_of(cell), float(run.recipe.epochs)
        if key in found:
            continue
        if cell.kind == "measure":
            found[key] = OVERHEAD + prices.seconds(cell.measure, run.model, data, members, random)
        elif cell.kind == "cost":
            found[key] = OVERHEAD + 40 * step
        elif cell.kind == "search":
            search = cell.settings["search"]
            count = search.get("trials") or len(search["lr"]) * len(search["warmup"])
            found[key] = OVERHEAD + epoch(cell.settings) * count * max(1, round(search["share"] * epochs))
        elif cell.kind == "lengths":
            found[key] = OVERHEAD + epoch(cell.settings) * epochs * sum(cell.settings["search"]["lengths"])
        elif "epochs of" in cell.settings:
            theirs = TrainRun(**cell.needs[-1].settings["run"], device=device)
            found[key] = OVERHEAD + prices.step(theirs, data) * epoch(cell.settings) / step * theirs.recipe.epochs
        else:
            found[key] = OVERHEAD + epoch(cell.settings) * epochs
    return found


class _Prices:
    """Seconds of steps and images: timed on untrained networks, or counted where a step takes long."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._speeds: dict[tuple[str, Any, int], audit_cost.Speed] = {}
        self._ratios: dict[str, float] = {}
        self._steps: dict[str, float] = {}

    def noisy(self, run: TrainRun, data: Dataset) -> bool:
        """Whether a defence adds noise to its network."""
        with seeded(0, "plan"):
            model: Any = models.create("lenet5", data, members=run.defense.num_members)
            run.defense.configure_model(model)
        return bool(models.injections(model))

    def speed(self, model: str, data: Dataset) -> audit_cost.Speed:
        """Seconds of one image forward and of one gradient."""
        key = (model, data.train.shape, len(data.classes))
        if key not in self._speeds:
            with seeded(0, "plan"):
                network = models.create(model, data).to(self.device)
            self._speeds[key] = audit_cost.measured(
                network, data, SUITES["quick"].model_copy(update={"surrogate": "none"})
            )
        return self._speeds[key]

    def step(self, run: TrainRun, data: Dataset) -> float:
        """Seconds of a step: timed, or if that takes too long that of a plain one times what :meth:`ratio` counts."""
        key = json.dumps([run.plain(), len(data.train)], sort_keys=True)
        if key not in self._steps:
            # A gradient of an image is a forward and a backward; that of the weights is one more.
            guess = 1.5 * self.speed(run.model, data).gradient * run.recipe.batch_size * self.ratio(run, data)
            self._steps[key] = guess if guess > LONG else plan_training(run, data).seconds_a_step
        return self._steps[key]

    def ratio(self, run: TrainRun, data: Dataset) -> float:
        """Operations of a step relative to one of standard training, counted on LeNet-5 with the same images."""
        batch = run.recipe.batch_size
        few = Dataset(data.name, data.train.sample(2 * batch), data.validation, data.test, classes=data.classes)
        small = run.model_copy(update={"model": "lenet5"})
        counts = []
        for one in (small, small.model_copy(update={"defense": Standard()})):
            key = json.dumps([one.defense.plain(), list(data.train.shape), batch], sort_keys=True)
            if key not in self._ratios:
                self._ratios[key] = operations(step_of(one, few))
            counts.append(self._ratios[key])
        return counts[0] / counts[1]

    def seconds(self, measure: Any, model: str, data: Dataset, members: int, random: bool) -> float:
        """Seconds of a measurement, at the most."""
        forwards, gradients = self._images(measure, data, members, random)
        speed = self.speed(model, data)
        return float(members * (forwards * speed.forward + gradients * speed.gradient))

    def _images(self, measure: Any, data: Dataset, members: int, random: bool) -> tuple[int, int]:
        """Images that a measurement sends forward, and gradients of images that it takes, at the most."""
        noisy = random and getattr(measure, "noise", "on") == "on"
        votes, draws = (DEFAULT_VOTES, EOT_SAMPLES) if noisy else (1, 1)
        if isinstance(measure, AuditMeasure):
            suite = measure.suite if measure.suite.eps else measure.suite.model_copy(update={"eps": (0.1, 0.2, 0.3)})
            parts = audit_cost.parts_of(suite, data, random=random)
            return sum(part.forwards for part in parts), sum(part.gradients for part in parts)
        if isinstance(measure, EpsUniMeasure):  # eight perturbations (ours), each of which begins at the last one too
            runs = 8 * (measure.restarts + 1)
            return runs * votes * (len(data.validation) + len(data.test)), runs * measure.steps * 64
        few = min(getattr(measure, "test_images", len(data.test)), len(data.test))
        if isinstance(measure, JacobianMeasure):
            images = 2 * few + 2 * measure.pairs
            return images, images * len(data.classes)
        if isinstance(measure, SuiteMeasure):  # as if no image were broken by a cheaper attack
            return few * measure.queries * votes, few * audit_cost.SUITE_GRADIENTS * draws
        if not isinstance(measure, AttackMeasure):
            return few * votes, 0
        attack = measure.build(0.1)
        votes, draws = measure.votes or votes, getattr(attack, "eot_samples", None) or draws
        sources = 2 * members + 3 if measure.adaptive and members > 1 else 1
        steps = sources * getattr(attack, "steps", 10) * getattr(attack, "restarts", 1)
        if hasattr(attack, "craft"):
            held = votes * (len(data.test) + sources * len(data.validation))
            return held, steps * getattr(attack, "batch_size", 64)
        return few * (sources + 1) * votes, few * steps * draws
