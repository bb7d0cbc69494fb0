"""Options shared by several commands, the merging of flags and YAML into settings, and errors as a user typed them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from gambeson.base import Config, UserError
    from gambeson.models.black_box.http import HttpSettings

    Groups = Mapping[str, Iterable[str]]


class Kind(StrEnum):
    """Kinds of entries."""

    attacks = "attacks"
    defenses = "defenses"
    models = "models"
    data = "data"
    diagnostics = "diagnostics"
    tasks = "tasks"


NAMES = Path("~/.cache/gambeson/names.json").expanduser()
"""Registered names, for completion."""


def registry(kind: str) -> Any:
    """Return the registry of a kind of entries."""
    if kind == Kind.attacks:
        from gambeson.attacks.registry import ATTACKS as REGISTRY
    elif kind == Kind.defenses:
        from gambeson.defenses.registry import DEFENSES as REGISTRY
    elif kind == Kind.models:
        from gambeson.models.registry import MODELS as REGISTRY
    elif kind == Kind.data:
        from gambeson.data.registry import SETS as REGISTRY
    elif kind == Kind.tasks:
        from gambeson.tasks.task import TASKS as REGISTRY
    else:
        from gambeson.auditing.diagnostics.base import REGISTRY
    return REGISTRY


def complete(kind: str) -> Callable[[str], list[str]]:
    """Return the shell completion of the names of a registry; see ``gambeson list``."""

    def names(incomplete: str) -> list[str]:
        known = {*_own_names(kind), *(point.name for point in entry_points(group=f"gambeson.{kind}"))}
        return sorted(name for name in known if name.startswith(incomplete))

    return names


def _own_names(kind: str) -> list[str]:
    """Return the library's own names of a kind, from a file after the first time: registries import torch."""
    root = Path(__file__).parents[1]
    stamp = f"{root} {max(file.stat().st_mtime_ns for file in root.rglob('*.py'))}"
    try:
        known = json.loads(NAMES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get("stamp") != stamp:
        known = {"stamp": stamp}
    if kind not in known:
        known[kind] = [entry.name for entry in registry(kind).own()]
        with suppress(OSError):
            NAMES.parent.mkdir(parents=True, exist_ok=True)
            NAMES.write_text(json.dumps(known), encoding="utf-8")
    return list(known[kind])


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Run folder, weights, architecture, program or black box: see `audit -h`."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data set; see `gambeson list data`.",
        show_default="that of the (first) training run",
        autocompletion=complete("data"),
    ),
]
EPS = "8/255; 0.2 for grey images"
Eps = Annotated[str | None, typer.Option(help="Radius, such as 0.2 or 8/255.", show_default=EPS)]
Norm = Annotated[str | None, typer.Option(help="Norm of the ball: inf, 2 or, for some attacks, 1.", show_default="inf")]
EotSamples = Annotated[
    int | None,
    typer.Option(
        help="Samples of a random model that every gradient is averaged over; 10 if not given.",
        show_default="none",
    ),
]
Images = Annotated[
    int | None, typer.Option(help="Maximum number of test images (stratified).", show_default="1000", metavar="N")
]
Attack = Annotated[
    str | None,
    typer.Option(
        help="A name of `gambeson list attacks`, or FILE.py:CLASS.",
        show_default="pgd",
        autocompletion=complete("attacks"),
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
RunSeed = Annotated[int | None, typer.Option("--seed", help="Seed of every random draw.", show_default="0")]
Device = Annotated[str, typer.Option(help="Device; auto uses the accelerator if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, without progress.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Output folder; an interrupted run resumes there.", show_default="named after the model"
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML with settings, such as the run.yaml of a finished run."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as NAME=VALUE: momentum=0.8, or its full path recipe.momentum=0.8"),
]
SetAttack = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the attack, as NAME=VALUE; see `gambeson list attacks NAME`."),
]
SetSuite = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the suite, as NAME=VALUE: pgd_restarts=5; see docs/suites.md."),
]

Budget = Annotated[
    int | None,
    typer.Option(help="Black boxes: maximum number of images sent.", min=1, show_default="no limit", metavar="N"),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        help="Minutes for the whole audit; the suite is reduced to fit.", show_default="no limit", metavar="N"
    ),
]
Http = Annotated[
    list[str] | None,
    typer.Option(
        "--http", help="Servers: token_env=VARIABLE, headers.NAME=TEXT, timeout, retries, pause, workers, batch."
    ),
]

_NAMED = ("defense", "suite")
"""Groups of settings that may be given as their name alone, as in YAML."""
_typed: ContextVar[dict[tuple[str, ...], str] | None] = ContextVar("typed", default=None)
"""How the user gave each setting of this command, by its path."""


def sentence(error: UserError, arguments: list[str]) -> str:
    """Return the sentence of an error, led by the option at fault as it was typed."""
    path = tuple(part for part in error.path if not part.isdecimal())
    typed = _typed.get() or {}
    for length in range(len(path), 0, -1):
        part = path[:length]
        for known in sorted(typed, key=len):
            if known[-length:] == part or known[:length] == part:
                return f"{typed[known]}: {error.reason}"
    option = f"--{path[-1].replace('_', '-')}" if path else ""
    if option and option in arguments:  # of a command without a run's settings
        return f"{' '.join(arguments[arguments.index(option) :][:2])}: {error.reason}"
    return str(error) if path else error.reason


def _remember(path: str, typed: str) -> None:
    known = _typed.get()
    if known is None:
        known = {}
        _typed.set(known)
    known[tuple(path.split("."))] = typed


def forget() -> None:
    """Forget what was typed, at the start of a command."""
    _typed.set(None)


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints text as it is: names of users may hold square brackets, which are no markup."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


@contextmanager
def progress(as_json: bool) -> Iterator[Console]:
    """Show progress on standard error, unless the output is JSON."""
    from gambeson.base import show_progress

    console = plain_console(stderr=True, quiet=as_json)
    if as_json:
        yield console
        return
    with show_progress(console):
        yield console


def one_model(argument: str | None, option: str | None) -> str | None:
    """Return the model of a command, which is an argument or ``--model``.

    Raises:
        UserError: two were given.
    """
    from gambeson.base import UserError

    if argument and option and argument != option:
        raise UserError(f"two models were given, {argument} and --model {option}: name one")
    return argument or option


def needed(model: str | None, command: str) -> str:
    """Return the model of a command.

    Raises:
        UserError: none was given.
    """
    from gambeson.base import UserError

    if model is None:
        raise UserError(f"no model was given: name one, for example `gambeson {command} runs/x`, a training run")
    return model


def folder_beside(model: str, what: str) -> Path:
    """Return the default output folder of a model: next to its own, or under ``runs`` if it has none."""
    if Path(model).exists():
        return Path(f"{model.removesuffix('/')}-{what}")
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')}-{what}"


def put(settings: dict[str, Any], path: str, value: Any, typed: str | None = None) -> None:
    """Set the dotted ``path`` in nested settings, unless ``value`` is None (a flag that was not given).

    Args:
        settings: changed in place.
        path: such as ``recipe.momentum``.
        value: the value.
        typed: how the user gave it; by default as the option called as the last part of the path.
    """
    from gambeson.base import UserError

    option = f"--{path.removesuffix('.name').rpartition('.')[2].replace('_', '-')}"
    if value is None:
        _remember(path, option)
        return
    _remember(path, typed or f"{option} {','.join(map(str, value)) if isinstance(value, list) else value}")
    *parents, last = path.split(".")
    for parent in parents:
        below = settings.setdefault(parent, {})
        if below is None:
            below = {}
        if isinstance(below, str) and parent in _NAMED:
            below = {"name": below}
        if not isinstance(below, dict):
            raise UserError(f"{path} cannot be set: {parent} is {below!r}, not a group of settings")
        if last == "name" and not _same(below.get("name"), value):
            below = {}  # the other settings are those of another
        settings[parent] = below
        settings = below
    settings[last] = value


def _same(name: object, other: object) -> bool:
    """Whether two names refer to the same thing, ignoring stored hashes."""
    from gambeson.base import user_code

    if all(isinstance(one, str) and user_code.is_spelling(one) for one in (name, other)):
        return user_code.parts(str(name)) == user_code.parts(str(other))
    return name == other


def chosen(
    run: type[Config],
    config: Path | None,
    flags: Mapping[str, Any],
    pairs: list[str] | None,
    device: str,
    groups: Callable[[dict[str, Any]], Groups],
) -> dict[str, Any]:
    """Merge the settings of a run: ``--config``, overridden by flags, overridden by ``--set``.

    Args:
        run: the class of the run's settings.
        config: a YAML file.
        flags: by path; None if not given.
        pairs: of ``--set``.
        device: ``auto`` keeps that of the file.
        groups: from the settings so far to the groups of settings in them, each with its names.
    """
    from gambeson.base import pick_device, read_settings

    settings: dict[str, Any] = {}
    if config is not None:
        settings = read_settings(config, run.model_fields["kind"].default)
        for name in settings:
            _remember(name, f"{config}: {name}")
    for path, value in flags.items():
        put(settings, path, value)
    put_all(settings, pairs, run.model_fields, groups)
    if device != "auto" or "device" not in settings:
        settings["device"] = pick_device(device)
    return settings


def put_all(
    settings: dict[str, Any], pairs: list[str] | None, own: Iterable[str], groups: Callable[[dict[str, Any]], Groups]
) -> None:
    """Apply every ``--set name=value``; values are parsed as YAML.

    What stands before the first dot may be the name of a setting in any group; see :func:`chosen`.
    """
    import yaml

    from gambeson.base import UserError
    from gambeson.base.config import nearest
    from gambeson.base.files import parse_yaml

    for pair in pairs or []:
        typed = f"--http {pair.removeprefix('http.')}" if pair.startswith("http.") else f"--set {pair}"
        name, sign, text = pair.partition("=")
        if not sign or not all(part.strip() == part != "" for part in name.split(".")):
            raise UserError(f"{typed}: expected NAME=VALUE, for example --set momentum=0.8")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None)
            raise UserError(f"{typed}: {text!r} is not YAML ({why}), quote it or close its brackets") from None
        path, head = name, name.partition(".")[0]
        inside = {} if head in own else groups(settings)
        if inside and head not in inside:
            homes = [group for group, names in inside.items() if head in names]
            if not homes:
                known = {*own, *(one for names in inside.values() for one in names)}
                raise UserError(f"--set {pair}: there is no setting {head!r}: {nearest(head, known)}")
            if len(homes) > 1:
                raise UserError(f"--set {pair}: say which, {' or '.join(f'{home}.{name}' for home in homes)}")
            path = ".".join([*homes, name])
        parts = tuple(path.split("."))
        for place, earlier in (_typed.get() or {}).items():
            valued = earlier.startswith("--") and " " in earlier  # not of a file, nor an option that was not given
            if valued and place[: len(parts)] == parts and earlier != typed:
                raise UserError(f"{earlier} and {typed} give the same setting: leave one out")
        put(settings, path, value, typed=typed)


def pairs(set_: list[str] | None, http: list[str] | None) -> list[str]:
    """Return every ``--set name=value``, and every ``--http name=value`` as one of them."""
    return [*(set_ or []), *(f"http.{pair}" for pair in http or [])]


def http_settings(http: list[str] | None) -> HttpSettings | None:
    """Return the settings of ``--http``; None without any."""
    from gambeson.models.black_box.http import HttpSettings

    settings: dict[str, Any] = {}
    put_all(settings, pairs(None, http), (), lambda _: {})
    return HttpSettings(**settings["http"]) if settings else None


def print_json(content: Any) -> None:
    """Print JSON."""
    typer.echo(json.dumps(content, indent=2, sort_keys=True))
