"""``gambeson zoo``: trained networks and universal perturbations by name, their cards, and their verification."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from gambeson.cli.options import Device, Json, complete, plain_console, print_json, progress

app = typer.Typer(help="Trained networks and universal perturbations by name.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name of `gambeson zoo list`.")]
_WIDE = 110
"""Columns of a terminal that has room for what each network is."""


@app.command("list")
def list_(
    data: Annotated[str | None, typer.Option(help="Only networks of a data set.", show_default="all")] = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help="Only networks of a defence.", show_default="all", autocompletion=complete("defenses"), metavar="NAME"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the networks, with accuracy, error under one perturbation, and accuracy under the attack suite, in per cent.

    Other commands take zoo:NAME wherever they take a model or the file of a perturbation.

    Example: `gambeson zoo list --data fashion-mnist`

    Example: `gambeson audit zoo:digits/lenet5/standard --suite glance`
    """
    from gambeson import zoo
    from gambeson.base import eps_text

    entries = zoo.list(data=data, defense=defense)
    if as_json:
        print_json([one.plain() for one in entries])
        return
    table, console = Table(box=None, pad_edge=False, header_style="bold"), plain_console()
    for column in ("name", "eps", "clean", "UER", "suite"):
        table.add_column(column, overflow="fold", no_wrap=True, justify="left" if column == "name" else "right")
    if wide := console.width >= _WIDE:
        table.add_column("what")
    for one in entries:
        rates = (f"{100 * rate.value:.1f}" for rate in (one.clean, one.uer, one.suite))
        table.add_row(one.name, eps_text(one.eps), *rates, *[one.summary] * wide)
    console.print(table)


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Print the card of a network: how it was trained, and what it was measured at.

    Example: `gambeson zoo show fashion-mnist/lenet5/shared-s16`
    """
    from gambeson import zoo

    if as_json:
        print_json(zoo.entry(name).plain() | {"card": zoo.card(name)})
    else:
        typer.echo(zoo.card(name))


@app.command("verify")
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of `gambeson zoo list`.", show_default="all", metavar="[NAME]...")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every file by its digest, and score network and perturbation again; exit code 2 unless all are as stored.

    Example: `gambeson zoo verify digits/lenet5/standard`
    """
    from gambeson import zoo
    from gambeson.base import UserError, pick_device, tracked

    chosen = [zoo.entry(name) for name in names] if names else zoo.list()
    with progress(as_json) as console:
        place = pick_device(device)
        found = [zoo.verify(one.name, device=place) for one in tracked(chosen, "verify", len(chosen))]
    if as_json:
        print_json([one.plain() for one in found])
    else:
        table = Table(title="per cent [95 % interval]", box=box.SIMPLE_HEAD)
        for column in ("name", "clean", "UER", "verified"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for one in found:
            rates = ("" if rate is None else str(rate) for rate in (one.clean, one.uer))
            table.add_row(one.name, *rates, "yes" if one.passed else f"no: {one.reason}")
        console.print(table)
    if failed := [one for one in found if not one.passed]:
        raise UserError(f"{failed[0].name} is not verified: {failed[0].reason}")
