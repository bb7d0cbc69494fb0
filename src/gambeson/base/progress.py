"""Progress of long-running work. The library reports it; only the command line shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_display: ContextVar[Progress | None] = ContextVar("display", default=None)


@contextmanager
def show_progress(console: Console) -> Iterator[None]:
    """Show a progress bar, with the remaining time, for every task that starts inside the block."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=False) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


@contextmanager
def task(label: str, total: int, *, done: int = 0) -> Iterator[Callable[[], None]]:
    """Announce ``total`` units of work; call the yielded function once after each."""
    display = _display.get()
    if display is None:
        yield lambda: None
        return
    name = display.add_task(label, total=total, completed=done)
    yield lambda: display.advance(name)
    display.refresh()
