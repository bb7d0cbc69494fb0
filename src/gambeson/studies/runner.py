"""Running a study: which cell comes next, what it does, when to stop; in this process or in several."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gambeson.base import OutOfSpace, UserError, one_line, task, writable, write_yaml
from gambeson.data import Dataset
from gambeson.studies import trainings
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.measures import load_trained
from gambeson.studies.store import TAKEOVERS, Damaged, Estimates, Store, remove, write_cell
from gambeson.studies.study import Study, StudyData
from gambeson.training import TrainRun

FILE = "study.yaml"
_WEIGHTS = "run/model.safetensors"
_POLL = 1.0
"""Seconds between two looks at cells that others work on."""


class TimeUp(BaseException):
    """The time that a study was given is over."""


@lru_cache(1)
def _loaded(text: str, fewer: bool) -> Dataset:
    return StudyData.model_validate_json(text).load(fewer=fewer)


def load(cell: Cell) -> Dataset:
    """Load the data of a cell, kept for the next one. A search takes fewer images where there are no more."""
    return _loaded(StudyData(**cell.settings["data"]).model_dump_json(), cell.kind == "search")


def execute(cell: Cell, store: Store, device: str) -> None:
    """Do the work of a cell, or resume it, and store its result.

    Raises:
        UserError: its settings do not fit.
        Damaged: a cell that it needs is damaged.
    """
    began = time.perf_counter()
    found = [store.read(need, files=True) for need in cell.needs]
    for need, content in zip(cell.needs, found, strict=True):
        if content is None:
            raise Damaged(f"{need.title} has no result")
    results = [content["result"] for content in found if content is not None]
    folder, data = store.folder(cell), load(cell)
    eps, files = cell.settings["data"]["eps"], tuple[str, ...]()
    result: dict[str, Any]
    if cell.kind == "measure":
        measure = cell.measure
        trained = load_trained(
            store.folder(cell.needs[0]) / "run",
            data,
            eps,
            cell.settings["seed"],
            folder,
            device,
            store.folder(cell.needs[1]) / "run" if len(cell.needs) > 1 else None,
        )
        result = measure.measure(trained).plain()
    else:
        run = TrainRun(**cell.settings["run"], device=device)
        if cell.kind == "cost":
            result = dict(trainings.cost(run, data, next(iter(results), None)))
        elif cell.kind == "search":
            result = trainings.search(run, data, eps, cell.settings["search"], folder / "runs")
        elif cell.kind == "lengths":
            result = trainings.lengths(run, data, eps, cell.settings["search"], results[0], folder / "runs")
        else:
            by_kind: dict[str, list[Any]] = {"search": [], "cost": []}
            for need, content in zip(cell.needs, results, strict=True):
                by_kind[need.kind].append(content)
            result = trainings.train(
                run,
                data,
                eps,
                folder / "run",
                searched=next(iter(by_kind["search"]), None),
                costs=by_kind["cost"],
                reference=cell.settings.get("epochs of", 0),
            )
            files = (_WEIGHTS,)
    store.write(cell, result, time.perf_counter() - began, files, device)


@dataclass
class Runner:
    """Works on the cells of a study until none is left that it can do.

    Args:
        matrix: the cells.
        store: where results are.
        device: of the computations.
        deadline: of ``time.monotonic``, when to stop; None: never.
        seconds: what a cell is expected to take; None where nothing is known.
        run: name of this run, by which its workers know each other's failures.
    """

    matrix: Matrix
    store: Store
    device: str
    deadline: float | None = None
    seconds: Callable[[Cell], float | None] = lambda _: None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.done: set[str] = set()
        self._named: set[str] = set()

    def look(self) -> list[Cell]:
        """Return the cells without a result, in the order of work, after a look at the store."""
        for cell in self.matrix.cells:
            if cell.address not in self.done and self._finished(cell):
                self.done.add(cell.address)
        return [cell for cell in self.matrix.cells if cell.address not in self.done]

    def _finished(self, cell: Cell) -> bool:
        try:
            return self.store.read(cell) is not None
        except Damaged as error:
            if cell.address not in self._named:
                warnings.warn(f"{cell.title}: {error}; it is made again", stacklevel=2)
                self._named.add(cell.address)
            return False

    def failed(self, cell: Cell) -> bool:
        """Whether a cell failed for good in this run."""
        found = self.store.failure(cell)
        return found is not None and found.run == self.run and found.times > self.retries

    @property
    def retries(self) -> int:
        """How often a crashed cell is tried again."""
        return self.matrix.study.resources.retries

    def ready(self, cell: Cell) -> bool:
        """Whether all that a cell needs is there, and it may be tried in this run."""
        return all(need.address in self.done for need in cell.needs) and not self.failed(cell)

    def fits(self, cell: Cell) -> bool:
        """Whether a cell is expected to end in time."""
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        return left > 0 and (self.seconds(cell) or 0.0) <= left

    def go(self) -> list[Cell]:
        """Work until nothing is left that can be done; return what is left.

        Raises:
            OutOfSpace: the disk is full; the study is intact.
        """
        total = len(self.matrix.cells)
        left = self.look()
        try:
            with (
                _limit(self.deadline),
                _threads(self.matrix.study, self.device),
                task(f"study {self.matrix.study.name}", total, done=total - len(left)) as advance,
            ):
                while left:
                    before = len(left)
                    if not any(self.attempt(cell) for cell in left if self.ready(cell) and self.fits(cell)):
                        others = any(self.store.held(cell) for cell in left)
                        left = self.look()
                        if not others and not any(self.ready(cell) and self.fits(cell) for cell in left):
                            break
                        time.sleep(_POLL)
                    left = self.look()
                    for _ in range(before - len(left)):
                        advance()
        except TimeUp:  # also before the first cell
            left = self.look()
        return left

    def attempt(self, cell: Cell) -> bool:
        """Try to do a cell; return whether anything was done about it.

        Raises:
            OutOfSpace: the disk is full.
        """
        lock = self.store.lock(cell)
        if lock is None:
            return False
        with lock:
            if self._finished(cell) or self.failed(cell):  # by another runner, before the lock was free
                return self._finished(cell)
            folder = self.store.folder(cell)
            if lock.number >= TAKEOVERS:
                self.store.fail(cell, f"{lock.number} runners died over it", self.run, self.retries + 1)
                return True
            write_cell(folder, cell)
            try:
                execute(cell, self.store, self.device)
                # Measured already where it was done before, and perhaps of other weights.
                self.done -= {other.address for other in self.matrix.cells if cell in other.needs}
            except OutOfSpace:
                raise
            except Damaged as error:
                self._repair(cell, error)
            except UserError as error:
                self.store.fail(cell, str(error), self.run, self.retries + 1)
            except Exception as error:  # a bug, or a machine's: tried again, then told
                text = "".join(traceback.format_exception(error)[-6:])
                self.crashed(cell, f"{type(error).__name__}: {one_line(error)}\n{text}")
        return True

    def crashed(self, cell: Cell, message: str) -> None:
        """Note that a cell crashed; it is tried again in this run until it has no retries left."""
        known = self.store.failure(cell)
        times = known.times + 1 if known and known.run == self.run else 1
        self.store.fail(cell, message, self.run, times)

    def _repair(self, cell: Cell, error: Damaged) -> None:
        """Discard what a cell needs and cannot use; it is made again."""
        warnings.warn(f"{cell.title} cannot begin: {error}; that is made again", stacklevel=2)
        for need in cell.needs:
            try:
                whole = self.store.read(need, files=True) is not None
            except Damaged:
                whole = False
            if not whole:
                self.done.discard(need.address)
                lock = self.store.lock(need)
                if lock is not None:
                    with lock:
                        discard(self.store.folder(need))


def discard(folder: Path) -> None:
    """Empty the folder of a cell, but for its lock."""
    for path in folder.iterdir():
        if not path.name.startswith("lock."):
            remove(path)


@contextmanager
def _limit(deadline: float | None) -> Iterator[None]:
    """Raise :class:`TimeUp` inside the block when the time is over, in the main thread."""
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _threads(study: Study, device: str) -> Iterator[None]:
    """Compute on as many threads as a cell is given, so that numbers do not depend on how the study is run."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(max(1, math.floor(study.resources.cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(study: Study, root: Path) -> Matrix:
    """Write the study's file into its folder, and return its cells.

    Raises:
        UserError: a setting is wrong, nothing is to be trained, or the folder cannot be written.
    """
    matrix = Matrix(study)
    if not matrix.cells:
        raise UserError(
            f"the study {study.name} trains nothing: no model and defence share a data set; widen their data and models"
        )
    writable(root)
    write_yaml(root / study.name / FILE, study.plain())
    return matrix


def run_workers(runner: Runner, workers: int) -> list[Cell]:
    """Run a study in several processes on this machine; a process that dies is replaced.

    Args:
        runner: as for one process.
        workers: their number.

    Returns:
        The cells that are left.

    Raises:
        OutOfSpace: the disk is full; the study is intact.
    """
    context, spare = multiprocessing.get_context("spawn"), workers + TAKEOVERS
    total, said = len(runner.matrix.cells), list[str]()
    left = runner.look()

    def begin(number: int) -> Any:
        ours, theirs = context.Pipe(duplex=False)
        place = _place(runner.device, number)
        given = (runner.matrix.study.model_dump_json(), runner.store.root, place, time_left(runner), runner.run, theirs)
        process = context.Process(target=_work, args=given, daemon=True)
        process.start()
        theirs.close()
        return number, process, ours

    running = [begin(number) for number in range(workers)]
    with task(f"study {runner.matrix.study.name}", total, done=total - len(left)) as advance:
        try:
            while running:
                for number, process, pipe in list(running):
                    process.join(_POLL / len(running))
                    if process.is_alive():
                        continue
                    running.remove((number, process, pipe))
                    try:
                        said.append(pipe.recv())
                        continue
                    except EOFError:  # it said nothing: it is done, or dead
                        pipe.close()
                    if process.exitcode and process.exitcode < 0 and spare and time_left(runner) != 0:
                        spare -= 1
                        running.append(begin(number))
                before, left = len(left), runner.look()
                for _ in range(before - len(left)):
                    advance()
        finally:
            for _, process, _ in running:
                process.terminate()
    if said:
        raise OutOfSpace(said[0])
    return left


def time_left(runner: Runner) -> float | None:
    """Seconds until the deadline."""
    return None if runner.deadline is None else max(0.0, runner.deadline - time.monotonic())


def _place(device: str, number: int) -> str:
    """The accelerator of a worker: they take turns where there are several."""
    count = torch.accelerator.device_count() if device != "cpu" and ":" not in device else 1
    return device if count < 2 else f"{device}:{number % count}"


def end_with_parent() -> None:
    """End this process once the one that began it has, even if that was killed: nobody waits for its work any more.

    What it leaves half done is taken over as after any other kill.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(study: str, root: Path, device: str, left: float | None, run: str, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
    matrix, store = Matrix(Study.model_validate_json(study)), Store(root)
    deadline = None if left is None else time.monotonic() + left
    try:
        Runner(matrix, store, device, deadline, Estimates(matrix, store, device).of, run).go()
    except UserError as error:
        pipe.send(str(error))
