"""Run folders: one run each, with its settings in ``run.yaml``."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from gambeson.base.config import Config
from gambeson.base.errors import UserError
from gambeson.base.files import writable, write_yaml

_UNLIKE = ("environment", "finished")  # may differ between two runs with the same settings
_PASSING = {"http": None}
"""Settings that change no result: a run may be resumed with others."""


def check_run(folder: Path, run: Config) -> bool | None:
    """Check, before any work, that a run can start or resume in its folder; nothing is written.

    Settings that the stored run lacks, because an earlier version started it, have their defaults. A folder that holds
    only the ``run.yaml`` of another run, which left nothing else, is free.

    Returns:
        Whether the run has already finished; None if it has not begun.

    Raises:
        UserError: the folder cannot be written, or contains another run, or files of no run.
    """
    writable(folder)
    file, settings = folder / "run.yaml", run.plain()
    if file.is_file():
        held = read_yaml(file)
        known = {key: value for key, value in held.items() if key not in _UNLIKE}
        with suppress(UserError):
            known = type(run)(**known).plain()
        if known | _PASSING == settings | _PASSING:
            return bool(held.get("finished"))
        if [path for path in folder.rglob("*") if path.is_file()] == [file]:
            return None
        unlike = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
        raise UserError(
            f"{folder} holds another run (it differs in {', '.join(unlike)}): choose another --out, "
            "or give the same settings to resume that one"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run of this kind: choose another --out")
    return None


def open_run(folder: Path, run: Config, environment: dict[str, str]) -> bool:
    """Create the folder of a run, or resume the run in it; see :func:`check_run`.

    Returns:
        Whether the run has already finished.

    Raises:
        UserError: as :func:`check_run`.
    """
    finished = check_run(folder, run)
    if finished is None:
        write_yaml(folder / "run.yaml", {**run.plain(), "environment": environment, "finished": False})
    elif not finished:
        begun = read_yaml(folder / "run.yaml").get("environment", environment)
        if other := sorted(key for key in environment if begun.get(key) != environment[key]):
            changes = ", ".join(f"{key} {environment[key]} after {begun.get(key)}" for key in other)
            warnings.warn(f"{folder} resumes with {changes}: its numbers may differ in the last digits", stacklevel=2)
    return bool(finished)


def close_run(folder: Path) -> None:
    """Mark the run of this folder as finished."""
    file = folder / "run.yaml"
    write_yaml(file, {**read_yaml(file), "finished": True})


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a YAML file, such as the run.yaml of a finished run") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({reason}): fix or delete it and retry") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a YAML file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected settings, one `name: value` per line")
    return content


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Read the settings of a run from YAML, written by hand or by an earlier run.

    Raises:
        UserError: they describe another kind of run.
    """
    content = {key: value for key, value in read_yaml(path).items() if key not in _UNLIKE}
    found = content.get("kind", kind)
    if found != kind:
        raise UserError(f"{path} describes a run of kind {found!r}: expected {kind!r}; use `gambeson {found}` for it")
    return content
