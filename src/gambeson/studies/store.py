"""Where the results of cells are stored, each in the folder of its address, and who works on which.

Runners share a folder, on one machine or on several with a common file system. Who works on a cell holds its
lock: a file ``lock.N`` whose time is refreshed every few seconds. A lock is stale once it has not been refreshed for
:data:`STALE` seconds, or its process is gone from this machine; it is taken over by creating ``lock.N+1``, which only
one runner can.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from gambeson.base import Config, Number, OutOfSpace, UserError, environment, read_json, write_json, write_yaml
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.study import CELLS

BEAT, STALE = 5.0, 60.0
"""Seconds between two refreshments of a lock, and after which it is stale."""
TAKEOVERS = 5
"""Runners that may die over one cell before it counts as failed."""
RESULT, FAILURE, PLAN = "result.json", "failure.json", "plan.json"


class Failure(Config):
    """How a cell failed last."""

    message: str
    run: str
    """Of which run of the study."""
    times: int
    """How often in that run."""
    title: str = ""


class Planned(Config):
    """The seconds that a plan has measured or counted, by :func:`key_of`."""

    device: str
    seconds: dict[str, Annotated[Number, Field(ge=0)]]


class Owner(Config):
    """Who holds a lock; the defaults are nobody that is known."""

    token: str = ""
    machine: str = ""
    process: Annotated[int, Field(ge=0, lt=2**31)] = 0


Noted = TypeVar("Noted", Failure, Planned, Owner)


def _noted(kind: type[Noted], file: Path) -> Noted | None:
    """Read what only helps: None where it is absent or damaged."""
    with suppress(ValueError):
        return kind.model_validate(read_json(file))
    return None


class Store:
    """The results below a folder.

    Args:
        root: the folder; several studies share it, and what they have in common is computed once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.root / CELLS / cell.address

    def read(self, cell: Cell, *, files: bool = False) -> dict[str, Any] | None:
        """Return what is stored of a cell; None if it has no result.

        Args:
            cell: the cell.
            files: check its files as well, such as the weights of a training.

        Raises:
            Damaged: what is stored is not what was written.
        """
        file = self.folder(cell) / RESULT
        if not file.exists():
            return None
        try:
            content = read_json(file)
        except UserError as error:
            raise Damaged(f"{file} is damaged ({error.reason})") from None
        if not isinstance(content, dict) or content.get("sha256") != digest(content):
            raise Damaged(f"{file} is damaged: it is not what was written")
        for need in cell.needs:
            of = content.get("of", {}).get(need.address)
            if of is not None and of != self._files(need, of):
                raise Damaged(f"{file} is not of the weights in {self.folder(need)}, which were made again")
        for name, known in content["files"].items() if files else ():
            if _file_digest(self.folder(cell) / name) != known:
                raise Damaged(f"{self.folder(cell) / name} is damaged or gone")
        return content

    def _files(self, cell: Cell, default: Mapping[str, str]) -> Mapping[str, str]:
        """Hashes of the files that a cell made; ``default`` where it has no result at present."""
        with suppress(UserError, TypeError, KeyError):
            return dict(read_json(self.folder(cell) / RESULT)["files"])
        return default

    def write(self, cell: Cell, result: Any, seconds: float, files: tuple[str, ...], device: str) -> None:
        """Store the result of a cell.

        Raises:
            OutOfSpace: it could not be written.
        """
        folder = self.folder(cell)
        content = {
            "cell": {"kind": cell.kind, "label": cell.label, "title": cell.title, "settings": cell.settings},
            "result": result,
            "seconds": seconds,
            "environment": environment(device),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "files": {name: _file_digest(folder / name) for name in files},
            "of": {need.address: made for need in cell.needs if (made := self._files(need, {}))},
        }
        _put(folder / RESULT, content | {"sha256": digest(content)})
        remove(folder / FAILURE)

    def fail(self, cell: Cell, message: str, run: str, times: int) -> None:
        """Note that a cell failed.

        Args:
            cell: the cell.
            message: why.
            run: of which run of the study.
            times: how often in that run.
        """
        failure = Failure(message=message, run=run, times=times, title=cell.title)
        _put(self.folder(cell) / FAILURE, failure.plain())

    def failure(self, cell: Cell) -> Failure | None:
        """Return how a cell failed last; None if it did not, or the note of it is damaged."""
        return _noted(Failure, self.folder(cell) / FAILURE)

    def lock(self, cell: Cell) -> Lock | None:
        """Take the lock of a cell; None if another runner holds it."""
        return Lock.take(self.folder(cell))

    def held(self, cell: Cell) -> bool:
        """Whether a runner works on a cell."""
        newest = _newest(self.folder(cell))
        return newest is not None and not _stale(self.folder(cell) / f"lock.{newest}")


def key_of(cell: Cell) -> str:
    """Cells of one key take about the same time."""
    parts = (cell.label or cell.kind, cell.row.defense, cell.row.data, cell.row.model)
    return " / ".join((*parts, *(["equal time"] if cell.kind == "train" and cell.row.at == "seconds" else [])))


class Estimates:
    """Seconds of a cell: the mean of finished ones of its key, or what :func:`gambeson.studies.planning.plan` stored.

    Args:
        matrix: the cells.
        store: the results.
        device: only what was measured on it counts.
    """

    def __init__(self, matrix: Matrix, store: Store, device: str) -> None:
        self.matrix, self.store, self.device = matrix, store, device
        stored = _noted(Planned, store.root / matrix.study.name / PLAN)
        self.planned = stored.seconds if stored is not None and stored.device == device else {}
        self._finished: dict[str, list[float]] = {}
        self._known: set[str] = set()
        self._looked = -math.inf

    def of(self, cell: Cell) -> float | None:
        """Seconds that a cell is expected to take; None where nothing is known."""
        self._collect()
        key = key_of(cell)
        return statistics.fmean(self._finished[key]) if key in self._finished else self.planned.get(key)

    def measured(self, cell: Cell) -> bool:
        """Whether finished cells say so."""
        self._collect()
        return key_of(cell) in self._finished

    def _collect(self) -> None:
        if time.monotonic() - self._looked < BEAT:  # thousands of cells ask in a row
            return
        self._looked = time.monotonic()
        for cell in self.matrix.cells:
            if cell.address in self._known:
                continue
            try:
                content = self.store.read(cell)
            except Damaged:
                continue
            if content is not None:
                self._known.add(cell.address)
                self._finished.setdefault(key_of(cell), []).append(content["seconds"])


class Damaged(UserError):
    """What is stored of a cell cannot be used."""


class Lock:
    """The right to work on a cell; see the module's text."""

    def __init__(self, folder: Path, number: int, token: str) -> None:
        self.folder, self.number, self.token = folder, number, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> Lock | None:
        """Create the lock file.

        Raises:
            OutOfSpace: it could not be created.
        """
        newest = _newest(folder)
        if newest is not None and not _stale(folder / f"lock.{newest}"):
            return None
        number, token = 0 if newest is None else newest + 1, uuid.uuid4().hex
        file = folder / f"lock.{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w", encoding="utf-8") as opened:
                opened.write(Owner(token=token, machine=_machine(), process=os.getpid()).model_dump_json())
        except FileExistsError:
            return None
        except OSError as error:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            remedy = "free some space and run the study again"
            raise OutOfSpace(f"could not write {file} ({error.strerror}): {remedy}") from None
        return cls(folder, number, token)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def mine(self) -> bool:
        """Whether no other runner has taken it over."""
        owner = _owner(self.folder / f"lock.{self.number}")
        return _newest(self.folder) == self.number and owner.token == self.token

    def release(self) -> None:
        """Give it up."""
        self._stop.set()
        self._thread.join(BEAT)
        if self.mine:
            for number in range(self.number + 1):
                with suppress(OSError):
                    (self.folder / f"lock.{number}").unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):
                if self.mine:
                    os.utime(self.folder / f"lock.{self.number}")


def _newest(folder: Path) -> int | None:
    numbers = [int(file.suffix[1:]) for file in folder.glob("lock.*") if file.suffix[1:].isdecimal()]
    return max(numbers, default=None)


def _owner(file: Path) -> Owner:
    return _noted(Owner, file) or Owner()


def _stale(file: Path) -> bool:
    owner = _owner(file)
    if _BOOT and owner.machine == _machine():
        try:
            os.kill(owner.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    try:
        return _now(file.parent) - file.stat().st_mtime > STALE
    except FileNotFoundError:
        return False  # released this moment; whoever comes next finds none


def _now(folder: Path) -> float:
    """The time by the clock that stamps files there, which may be another machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as file:
            return os.stat(file.name).st_mtime
    except OSError:
        return time.time()


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


_BOOT = _read("/proc/sys/kernel/random/boot_id")


def _machine() -> str:
    """Name of a machine whose processes this one can see."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {_BOOT} {space}"


def digest(content: Mapping[str, Any]) -> str:
    """Return the sha256 that a result is stored with, of all else in it."""
    kept = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return "missing"


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(file: Path, content: Any) -> None:
    """Write JSON, also in place of a folder, which only damage leaves there."""
    if file.is_dir():
        remove(file)
    write_json(file, content)


def write_cell(folder: Path, cell: Cell) -> None:
    """Write what a cell is, for readers."""
    write_yaml(folder / "cell.yaml", {"title": cell.title, "kind": cell.kind, "settings": cell.settings})
