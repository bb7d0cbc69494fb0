"""The stages of a long evaluation, each kept on disk when it is done, so that a cut run goes on after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gambeson.base import Config, read_json, write_json

ConfigT = TypeVar("ConfigT", bound=Config)


class Stages:
    """Results by name; with a folder they survive the process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._done = self._read("state/stages.json")
        self._seconds = self._read("timing.json")

    def do(self, name: str, kind: type[ConfigT], work: Callable[[], ConfigT]) -> ConfigT:
        """Return the kept result of this stage, or do the work and keep what it returns."""
        if name in self._done:
            return kind(**self._done[name])
        began = time.perf_counter()
        result = work()
        self._done[name] = result.plain()
        self._seconds[name] = time.perf_counter() - began
        if self._folder is not None:
            write_json(self._folder / "timing.json", self._seconds)
            write_json(self._folder / "state" / "stages.json", self._done)
        return result

    def _read(self, name: str) -> dict[str, Any]:
        if self._folder is None or not (self._folder / name).is_file():
            return {}
        return dict(read_json(self._folder / name))
