"""Progress of long-running work: bars in terminals and notebooks, else a line now and then. The library reports it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 10.0
"""Seconds between two lines."""
_TOLD = 0.02
"""Share of the whole from which on the time that is left is told."""


class Advance(Protocol):
    """A function that takes how many units of work are done."""

    def __call__(self, units: float = 1, /) -> None:
        """Show that they are done."""


class _Display(Protocol):
    console: Console

    def start(self, label: str, total: int, done: float) -> Advance: ...


ItemT = TypeVar("ItemT")
_display: ContextVar[_Display | None] = ContextVar("display", default=None)
_busy: ContextVar[bool] = ContextVar("busy", default=False)
"""Whether a task is shown."""


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars, self.console = bars, bars.console

    def start(self, label: str, total: int, done: float) -> Advance:
        name = self.bars.add_task(label, total=total)
        self.bars.update(name, completed=done)
        self.bars.refresh()
        return lambda units=1: self.bars.advance(name, units)


class _Lines:
    """One line per task when it ends, and one every few seconds meanwhile."""

    def __init__(self, console: Console) -> None:
        self.console, self.said = console, time.monotonic()

    def start(self, label: str, total: int, done: float) -> Advance:
        began, before, known, over = time.monotonic(), done, done, False

        def advance(units: float = 1, /) -> None:
            nonlocal known, over
            known, now = known + units, time.monotonic()
            done = min(total, int(known + 1e-6))  # units may be parts of one
            if over or (done < total and (now - self.said < _EVERY or known == before)):
                return
            over = done >= total
            self.said = now
            left = (now - began) / max(known - before, 1e-6) * (total - known)
            rest = f", about {left:.0f} s left" if done < total else f", {now - began:.0f} s"
            if known - before < _TOLD * total:  # the first seconds are no measure of the rest
                rest = ""
            self.console.print(
                f"{label.strip()}: {done} of {total}{rest}", markup=False, emoji=False, highlight=False, soft_wrap=True
            )

        return advance


@contextmanager
def show_progress(console: Console) -> Iterator[None]:
    """Show the progress of every task that starts inside the block, with the remaining time.

    Bars in a terminal and in a notebook (with ipywidgets); plain lines elsewhere, as in a log file.
    """
    bars = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    columns = (
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    progress = Progress(*columns, console=console, transient=False) if bars else None
    with progress or nullcontext():
        token = _display.set(_Bars(progress) if progress else _Lines(console))
        try:
            yield
        finally:
            _display.reset(token)


def say(text: str) -> None:
    """Print a line that must be read before the work goes on, where progress is shown."""
    display = _display.get()
    if display is not None:
        display.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def watched() -> bool:
    """Whether progress is shown and no task has begun, so that the next one is what somebody waits for."""
    return not _busy.get() and (_display.get() is not None or _in_notebook())


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def task(label: str, total: int, *, done: float = 0) -> Iterator[Advance]:
    """Announce ``total`` units of work; call the yielded function after each, or with a number of them.

    Nothing is shown outside :func:`show_progress`, but in notebooks.
    """
    with show_progress(Console()) if _display.get() is None and _in_notebook() else nullcontext():
        display, token = _display.get(), _busy.set(True)
        try:
            yield (lambda units=1: None) if display is None else display.start(label, total, done)
        finally:
            _busy.reset(token)


def tracked(items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
    """Yield ``items``, a unit of work each; they are shown as a task unless they are part of one."""
    display = _display.get()
    advance = None if display is None or _busy.get() else display.start(label, total, 0)
    for item in items:
        yield item
        if advance is not None:
            advance()
