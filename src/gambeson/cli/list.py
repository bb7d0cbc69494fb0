"""``gambeson list``: registered names, of this library and of installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gambeson.cli.options import Json, Kind, plain_console, print_json, registry

if TYPE_CHECKING:
    from gambeson.base import Registered, UserError


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    name: Annotated[str | None, typer.Argument(help="Show one entry with its settings; also FILE.py:NAME.")] = None,
    as_json: Json = False,
) -> None:
    """List attacks, defences, models, data sets, diagnostics or tasks by name, including those of installed packages.

    Example: `gambeson list attacks`

    Example: `gambeson list defenses shared-adversarial`
    """
    known = registry(kind)
    entries = known.entries() if name is None else [known.get(name)]
    if as_json:
        print_json([_plain(kind, entry) for entry in entries])
    elif name is None:
        plain_console().print(_table(kind, entries))
    else:
        plain_console().print(_details(_plain(kind, entries[0])))


def _plain(kind: Kind, entry: Registered[Any] | UserError) -> dict[str, Any]:
    if isinstance(entry, ValueError):
        return {"error": str(entry)}
    return entry.plain() | ({"makes": _made(entry)} if kind is Kind.attacks else {})


def _made(entry: Registered[Any]) -> str:
    from gambeson.attacks.registry import kind_of

    return {"image": "one perturbation per image", "universal": "one for all images"}[kind_of(entry)]


def _table(kind: Kind, entries: list[Registered[Any] | UserError]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", *(["makes"] if kind is Kind.attacks else []), "what", "package"):
        table.add_column(column, overflow="fold", no_wrap=column == "name" and kind is not Kind.diagnostics)
    for entry in entries:
        if isinstance(entry, ValueError):
            table.add_row("", *([""] if kind is Kind.attacks else []), f"error: {entry}", "")
        else:
            made = [_made(entry)] if kind is Kind.attacks else []
            table.add_row(entry.name, *made, entry.summary, entry.owner)
    return table


def _details(about: dict[str, Any]) -> Table:
    table = Table(
        title=f"{about['name']} ({about['package']}): {about['summary']}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("setting", "type", "default", "what"):
        table.add_column(column, overflow="fold")
    for name, setting in about["settings"].items():
        default = "required" if setting["required"] else str(setting["default"])
        table.add_row(name, setting["type"], default, setting["description"])
    return table
