"""Options shared by several commands, and the merging of flags and YAML into settings."""

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
Device = Annotated[str, typer.Option(help="Device; auto uses the accelerator if there is one.", show_default=True)]
Data = Annotated[str | None, typer.Option(help="Data set (default: that of the (first) training run).")]
Eps = Annotated[str | None, typer.Option(help="Radius, such as 0.2 or 8/255.")]
Norm = Annotated[str | None, typer.Option(help="Norm of the ball: inf, 2 or, for some attacks, 1.")]
EotSamples = Annotated[int | None, typer.Option(help="Samples of a random model that every gradient is averaged over.")]
RunSeed = Annotated[int | None, typer.Option("--seed", help="Seed of every random draw (0).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, without progress.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder; an interrupted run resumes there.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML with settings, such as the run.yaml of a finished run."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as name=value, nested with dots: recipe.momentum=0.8"),
]


@contextmanager
def progress(as_json: bool) -> Iterator[Console]:
    """Show progress on standard error, unless the output is JSON."""
    from gambeson.base import show_progress

    console = Console(stderr=True, quiet=as_json)
    if as_json:
        yield console
        return
    with show_progress(console):
        yield console


def folder_beside(model: str, what: str) -> Path:
    """Return the default output folder of a model: next to its own, or under ``runs`` if it has none."""
    if Path(model).exists():
        return Path(f"{model.removesuffix('/')}-{what}")
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')}-{what}"


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set the dotted ``path`` in nested settings, unless ``value`` is None (a flag that was not given)."""
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
    """Merge the settings of a run: ``--config``, overridden by flags, overridden by ``--set``.

    Args:
        config: a YAML file.
        kind: the expected kind of run, such as ``train``.
        flags: by path; None if not given.
        pairs: of ``--set``.
        device: ``auto`` keeps that of the file.
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
    """Apply every ``--set name=value``; values are parsed as YAML."""
    from gambeson.base import UserError

    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"--set {pair}: expected name=value, for example --set recipe.momentum=0.8")
        put(settings, name, yaml.safe_load(value))


def print_json(content: Any) -> None:
    """Print JSON."""
    typer.echo(json.dumps(content, indent=2, sort_keys=True))
