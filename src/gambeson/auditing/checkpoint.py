"""Checkpoints of stages: finished ones are stored on disk, so that an interrupted audit resumes after them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from gambeson.base import read_json, seeded, write_json, write_text
from gambeson.evaluation import BudgetSpent

ResultT = TypeVar("ResultT")


class Checkpoints:
    """Results by name; with a folder they are persistent.

    Inside a stage, torch's global generators depend only on the seed and the stage's name, so that a random model draws
    the same numbers in a resumed run.
    """

    def __init__(self, folder: Path | None, seed: int = 0) -> None:
        self._folder, self._seed = folder, seed
        self._done = self._read("state/stages.json")
        self._seconds = self._read("timing.json")
        self.left_out: list[str] = []
        """Stages that did not fit a black box's budget, as sentences."""

    def do(self, name: str, kind: Any, work: Callable[[], ResultT]) -> ResultT:
        """Return the stored result of this stage, or compute and store it.

        A result whose ``file`` is missing from the folder is computed again.

        Args:
            name: of the stage.
            kind: type of the result, for writing and reading.
            work: computes the result.
        """
        form: TypeAdapter[ResultT] = TypeAdapter(kind)
        if name in self._done and self._whole(self._done[name]):
            return form.validate_python(self._done[name])
        began = time.perf_counter()
        with seeded(self._seed, "stage", name):
            result = work()
        self._done[name] = form.dump_python(result, mode="json")
        self._seconds[name] = time.perf_counter() - began
        if self._folder is not None:
            write_json(self._folder / "timing.json", self._seconds)
            # Written after every stage, for the audit alone: without indents, C code writes it ten times as fast.
            write_text(self._folder / "state" / "stages.json", json.dumps(self._done, allow_nan=False))
        return result

    def afford(self, name: str, kind: Any, work: Callable[[], ResultT], instead: ResultT) -> ResultT:
        """Run a stage, or return ``instead`` if it does not fit a black box's budget."""
        try:
            return self.do(name, kind, work)
        except BudgetSpent as spent:
            self.left_out.append(f"{name} was left out: {spent}.")
            return instead

    def _whole(self, stored: Any) -> bool:
        file = stored.get("file") if isinstance(stored, dict) else None
        return self._folder is None or not file or (self._folder / file).is_file()

    def _read(self, name: str) -> dict[str, Any]:
        if self._folder is None or not (self._folder / name).is_file():
            return {}
        return dict(read_json(self._folder / name))
