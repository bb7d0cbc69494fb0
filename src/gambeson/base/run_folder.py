"""The folder of a run: whose it is, and what it may be resumed with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gambeson.base.config import Config
from gambeson.base.contents import contents
from gambeson.base.errors import UserError
from gambeson.base.files import read_yaml, writable, write_yaml

RUN = "run.yaml"
_UNLIKE = ("environment", "finished", "files")  # may differ between two runs with the same settings
_OPENED = {"environment", "finished"}  # what :func:`open_run` adds to the settings
_PASSING = {"http": None}
"""Settings that change no result: a run may be resumed with others."""


def _raised(held: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is held with the budget of queries that is given, if it is larger or none: no result changes."""
    suite, now = held.get("suite"), given.get("suite")
    if isinstance(suite, dict) and isinstance(now, dict):
        old, new = suite.get("budget"), now.get("budget")
        if isinstance(old, int) and (new is None or (isinstance(new, int) and old < new)):
            return {**held, "suite": {**suite, "budget": new}}
    return dict(held)


def _unlike(held: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that differ, with the names of their groups."""
    for key in sorted(held.keys() | given.keys()):
        one, other = held.get(key), given.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key}.{inner}" for inner in _unlike(one, other))
        elif one != other:
            yield key


def refuse_other(folder: Path, held: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder with other settings than it was begun with.

    Args:
        folder: named in the message.
        held: plain settings of what is there.
        given: those of now.

    Raises:
        UserError: they differ.
    """
    unlike = list(_unlike(_raised(held, given), given))
    if unlike:
        unlike = [*unlike[:4], f"{len(unlike) - 4} more"] if len(unlike) > 5 else unlike
        raise UserError(
            f"{folder} holds another run (it differs in {', '.join(unlike)}): choose another --out, "
            "or give the same settings to resume that one"
        )


def _changed(held: Any, now: Mapping[str, str]) -> list[str]:
    """Return the names whose files hold something else now; a file that is gone has not changed."""
    known = held if isinstance(held, dict) else {}
    return sorted(name for name in known.keys() & now.keys() if known[name] != now[name])


def check_run(folder: Path, run: Config) -> bool | None:
    """Check, before any work, that a run can start or resume in its folder; nothing is written.

    Settings that the stored run lacks, because an earlier version started it, have their defaults. The files that the
    settings name must hold what they held when it began (:func:`gambeson.base.contents`). A folder that holds only the
    ``run.yaml`` of another run, which left nothing else, is free.

    Returns:
        Whether the run has already finished; None if it has not begun.

    Raises:
        UserError: the folder cannot be written, or contains another run, or files of no run.
    """
    writable(folder)
    file, settings = folder / RUN, run.plain()
    if file.is_file():
        held = read_yaml(file)
        known = {key: value for key, value in held.items() if key not in _UNLIKE}
        with suppress(UserError):
            known = type(run)(**known).plain()
        changed, finished = _changed(held.get("files"), contents(settings)), bool(held.get("finished"))
        alike = known if finished else _raised(known, settings)
        if alike | _PASSING == settings | _PASSING and not changed:
            return finished
        if _OPENED - held.keys():
            raise UserError(f"{file} was not written by gambeson: choose another --out")
        if [path for path in folder.rglob("*") if path.is_file()] == [file]:
            return None
        refuse_other(folder, known | _PASSING, settings | _PASSING)
        if finished and not changed:
            raise UserError(f"{folder} holds a finished run: choose another --out for a larger budget")
        raise UserError(
            f"{folder} holds a run that began before {changed[0]} was changed: choose another --out, or restore it"
        )
    refuse_foreign(folder)
    return None


def refuse_foreign(folder: Path, kind: str | None = None, *states: str) -> None:
    """Refuse to write into a folder that holds files, unless the work that is to be done there wrote its own first.

    Args:
        folder: need not exist.
        kind: that of the run whose ``run.yaml`` may be there.
        states: files or folders of which the work writes one before all others.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    writable(folder)
    if any((folder / state).exists() for state in states):
        return
    file = folder / RUN
    if kind is not None and file.is_file():
        held = read_yaml(file)
        if held.get("kind") == kind and held.keys() >= _OPENED:
            return
    # Another process of the same run may just be writing its run.yaml.
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(f".{RUN}.") for p in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run of this kind: choose another --out")


def open_run(folder: Path, run: Config, environment: dict[str, str]) -> bool:
    """Create the folder of a run, or resume the run in it; see :func:`check_run`.

    Returns:
        Whether the run has already finished.

    Raises:
        UserError: as :func:`check_run`.
    """
    finished = check_run(folder, run)
    if finished is None:
        settings = run.plain()
        named = {"files": files} if (files := contents(settings)) else {}
        write_yaml(folder / RUN, {**settings, **named, "environment": environment, "finished": False})
    elif not finished:
        held = read_yaml(folder / RUN)
        if (raised := _raised(held, run.plain())) != held:
            write_yaml(folder / RUN, raised)
        begun = held.get("environment", environment)
        if other := sorted(key for key in environment if begun.get(key) != environment[key]):
            changes = ", ".join(f"{key} {environment[key]} after {begun.get(key)}" for key in other)
            warnings.warn(f"{folder} resumes with {changes}: its numbers may differ in the last digits", stacklevel=2)
    return bool(finished)


def close_run(folder: Path) -> None:
    """Mark the run of this folder as finished."""
    file = folder / RUN
    write_yaml(file, {**read_yaml(file), "finished": True})


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Read the settings of a run from YAML, written by hand or by an earlier run.

    Raises:
        UserError: they describe another kind of run.
    """
    content = {key: value for key, value in read_yaml(path).items() if key not in _UNLIKE}
    if odd := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path} has the entry {odd[0]}, which is no name of a setting: remove it")
    found = content.get("kind", kind)
    if found != kind:
        use = {
            ("train", "audit"): f"`gambeson audit {path.parent}` makes one of it",
            ("audit", "train"): f"it is no model; `gambeson report {path.parent}` shows it, and --out goes on with it",
        }.get((str(found), kind), "")
        raise UserError(
            f"{path} describes a run of kind {found!r}: expected {kind!r}; {use or f'use `gambeson {found}` for it'}"
        )
    return content
