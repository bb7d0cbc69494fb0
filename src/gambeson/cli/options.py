"""Options that several commands share, and how flags and YAML become one set of settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

Seed = Annotated[int, typer.Option(help="Seed of every random draw.", show_default=True)]
Device = Annotated[
    str, typer.Option(help="Where to compute; auto takes the accelerator if there is one.", show_default=True)
]
Data = Annotated[str | None, typer.Option(help="Data set; else the one the (first) run was trained on.")]
Eps = Annotated[str | None, typer.Option(help="Radius, such as 0.2 or 8/255.")]
Norm = Annotated[str | None, typer.Option(help="Norm of the ball: inf, 2 or, for some attacks, 1.")]
EotSamples = Annotated[int | None, typer.Option(help="Draws of a random model that every gradient is averaged over.")]
RunSeed = Annotated[int | None, typer.Option("--seed", help="Seed of every random draw (0).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines; no progress.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; a cut run goes on there.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML with settings, such as the run.yaml of a finished run."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as name=value; dots go deeper: recipe.momentum=0.8"),
]


@contextmanager
def progress(as_json: bool) -> Iterator[Console]:
    """Show progress on standard error, unless a machine reads along."""
    from gambeson.base import show_progress

    console = Console(stderr=True, quiet=as_json)
    if as_json:
        yield console
        return
    with show_progress(console):
        yield console


def folder_beside(model: str, what: str) -> Path:
    """Name a folder for what is done to a model: beside its own, or under ``runs`` where it has none."""
    if Path(model).exists():
        return Path(f"{model.removesuffix('/')}-{what}")
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')}-{what}"


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set ``path`` (dots go deeper) in nested settings, unless ``value`` is None: a flag that was not given."""
    from gambeson.base import UserError

    if value is None:
        return
    *parents, last = path.split(".")
    for parent in parents:
        below = settings.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"{path} cannot be set: {parent} is {below!r}, not a group of settings")
        settings = below
    settings[last] = value


def chosen(
    config: Path | None, kind: str, flags: Mapping[str, Any], pairs: list[str] | None, device: str
) -> dict[str, Any]:
    """Gather the settings of a run: those of ``--config``, over them the flags that were given, over these ``--set``.

    Args:
        config: a YAML file.
        kind: of run that it has to hold, such as ``train``.
        flags: by path; None was not given.
        pairs: of ``--set``.
        device: ``auto`` leaves what the file says.
    """
    from gambeson.base import pick_device, read_settings

    settings = read_settings(config, kind) if config else {}
    for path, value in flags.items():
        put(settings, path, value)
    put_all(settings, pairs)
    if device != "auto" or "device" not in settings:
        settings["device"] = pick_device(device)
    return settings


def put_all(settings: dict[str, Any], pairs: list[str] | None) -> None:
    """Apply every ``--set name=value``; values are read as YAML, so that 0.1, true and [1, 2] mean what they say."""
    from gambeson.base import UserError

    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"--set {pair}: expected name=value, for example --set recipe.momentum=0.8")
        put(settings, name, yaml.safe_load(value))


def print_json(content: Any) -> None:
    """Print JSON for machines."""
    typer.echo(json.dumps(content, indent=2, sort_keys=True))
