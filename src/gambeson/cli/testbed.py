"""``gambeson testbed``: obfuscated models with known ground truth, and error rates of auditors on them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from gambeson.cli.options import Json, Out, Seed, plain_console, print_json, progress

if TYPE_CHECKING:
    from gambeson.testbed import TestbedScore

app = typer.Typer(help="Score an audit, a detector or an attack suite on obfuscated models.", no_args_is_help=True)
DataOption = Annotated[str, typer.Option("--data", help="digits, mnist5k, fashion-mnist or cifar10.")]


@app.command("list")
def list_(data: DataOption = "digits", as_json: Json = False) -> None:
    """List the models: obfuscated ones by family, then the honest ones.

    Example: `gambeson testbed list --data mnist5k`
    """
    stored = json.loads((files("gambeson") / "testbed" / "models.json").read_text(encoding="utf-8"))
    if data not in stored["data"]:
        from gambeson.base import unknown_name

        raise unknown_name("data of the testbed", data, stored["data"])
    entries = [entry for entry in stored["models"] if entry["name"] in stored["data"][data]]
    if as_json:
        print_json(entries)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "kind", "how it deceives", "source"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(entry["name"], entry["kind"], entry["how"], entry["source"])
    plain_console().print(table)


@app.command("score")
def score(
    auditor: Annotated[
        str,
        typer.Option(
            help="quick, standard or full: a suite of the audit; pgd: PGD of 20 steps alone; autoattack (with its "
            "flags), art, foolbox: those of the extra bench; or FILE.py:FUNCTION, your own function from "
            "(model, data) to True or False: can the model be trusted?"
        ),
    ],
    data: DataOption = "digits",
    models: Annotated[str | None, typer.Option(help="Names from the list, separated by commas (all).")] = None,
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure how many obfuscated models an auditor misses, and how many honest ones it accuses.

    Example: `gambeson testbed score --auditor pgd --models "four grey levels,logits x 1e4,standard"`

    Example: `gambeson testbed score --auditor mine.py:judge --data digits --out runs/mine-on-testbed`
    """
    from gambeson import testbed

    names = None if models is None else _names(models, data)
    folder = out or Path("runs") / f"testbed-{data}-{Path(auditor).name.replace(':', '-')}"
    with progress(as_json) as console:
        found = testbed.score(auditor, data, names, seed=seed, out=folder)
    if as_json:
        print_json(found.plain())
        return
    console.print(_table(found))
    for outcome in found.wrong():
        console.print(f"{outcome.wrong}: {outcome.name} ({outcome.kind})")
    console.print(f"all judgements are in {folder / 'score.json'}")


def _names(text: str, data: str) -> list[str]:
    """Split at commas that are not inside a name."""
    from gambeson import testbed

    inside = [entry.name for entry in testbed.models(data) if "," in entry.name]
    for name in inside:
        text = text.replace(name, name.replace(",", "\0"))
    return [part.strip().replace("\0", ",") for part in text.split(",") if part.strip()]


def _table(found: TestbedScore) -> Table:
    table = Table(title=f"{found.auditor} on {found.data}: per cent [95 % interval] of models", box=box.SIMPLE_HEAD)
    for column in ("", "wrong", "models"):
        table.add_column(column, justify="right" if column else "left")
    rows = {"missed": found.missed, "accused": found.accused}
    if found.overstated is not None:
        rows["overstated without a warning"] = found.overstated
    for name, rate in rows.items():
        table.add_row(name, str(rate) if rate.n else "\N{EN DASH}", str(rate.n), style="bold")
    table.add_section()
    for kind, rate in found.by_kind.items():
        table.add_row(kind, str(rate), str(rate.n))
    return table
