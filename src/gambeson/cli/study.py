"""``gambeson study``: matrices of trainings and measurements with claims, planned, run, resumed and exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from gambeson.cli.options import Device, Json, plain_console, print_json, progress

if TYPE_CHECKING:
    from gambeson.studies import StudyPlan, StudyResult

app = typer.Typer(
    help="Run studies: matrices of trainings and measurements, and claims about them.", no_args_is_help=True
)
File = Annotated[Path, typer.Argument(metavar="FILE", help="A study: YAML as in the folder studies/.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of studies; results are shared by all studies in it.")]
DEFAULT = Path("runs/studies")


@app.command("plan")
def plan(file: File, out: Out = DEFAULT, device: Device = "auto", as_json: Json = False) -> None:
    """Print a study's number of cells, the cost of each kind on this machine, and the time on 1, 8 and 64 devices.

    Example: `gambeson study plan studies/claims-small.yaml`
    """
    from gambeson.base import duration, pick_device
    from gambeson.studies import Study, plan_study

    study = Study.load(file)
    with progress(as_json) as console:
        found = plan_study(study, out, pick_device(device))
    if as_json:
        print_json(found.plain())
        return
    console.print(_plan_table(found))
    for note in found.warnings:
        console.print(f"warning: {note}", soft_wrap=True)
    times = ", ".join(f"{duration(seconds)} on {count}" for count, seconds in found.seconds.items())
    console.print(
        f"{found.cells - found.done} of {found.cells} cells are left: about {times} such devices ({found.device})"
    )


@app.command("run")
def run(
    file: File,
    out: Out = DEFAULT,
    workers: Annotated[int, typer.Option(min=0, help="Processes on this machine; 0: this one.")] = 0,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local for a new one."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes to run for; only cells that fit are started.", show_default="no limit"),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run the missing cells of a study; the same command resumes it after an interruption, on any number of machines.

    The exit code is 2 if a cell has failed: the other cells are complete, and the same command retries it.

    Example: `gambeson study run studies/claims-small.yaml --minutes 30`
    """
    from gambeson.base import UserError, pick_device
    from gambeson.studies import Study, run_study

    study = Study.load(file)
    with progress(as_json):
        found = run_study(study, out, device=pick_device(device), workers=workers, ray=ray, minutes=minutes)
    _show(found, as_json)
    if not as_json:
        typer.echo(f"next: gambeson report {out / study.name}")
    if found.failed:
        title, reason = next(iter(found.failed.items()))
        raise UserError(f"{len(found.failed)} of {found.cells} cells have failed, among them {title}: {reason}")


@app.command("status")
def status(file: File, out: Out = DEFAULT, as_json: Json = False) -> None:
    """Print what is done, what failed, and the verdicts so far.

    Example: `gambeson study status studies/claims-small.yaml`
    """
    from gambeson.studies import Study, read_study

    _show(read_study(Study.load(file), out), as_json)


@app.command("export")
def export(
    file: File,
    to: Annotated[
        str, typer.Option(help="csv, parquet, json: a summary for version control; or cells, for study import.")
    ] = "csv",
    out: Out = DEFAULT,
    output: Annotated[
        Path | None, typer.Option("--file", "-f", help="Output file.", show_default="in the study's folder")
    ] = None,
    join: Annotated[
        Path | None, typer.Option(help="Earlier summary, used for the data sets of which it has more numbers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write every number of a study as a table, one line per number, or the results of its cells.

    Example: `gambeson study export studies/claims-small.yaml --to parquet`
    """
    from gambeson import studies
    from gambeson.base import UserError, read_json

    study = studies.Study.load(file)
    if to == "cells":
        if join is not None:
            raise UserError("--join takes in a summary, which has no cells: choose --to json, csv or parquet")
        path = output or out / study.name / f"{study.name}.jsonl.gz"
        written = studies.export_cells(study, out, path)
        _said(as_json, f"{written} results are in {path}", file=str(path), results=written)
        return
    found = studies.read_study(study, out)
    if join is not None:
        found = studies.joined(found, read_json(join))
    path = studies.export(found, to, output or out / study.name / f"{study.name}.{to}")
    _said(as_json, f"{len(found.rows)} rows are in {path}", file=str(path), rows=len(found.rows))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `gambeson study export STUDY --to cells` has written.")],
    out: Out = DEFAULT,
    as_json: Json = False,
) -> None:
    """Import the results of a study that ran elsewhere, to continue it here; weights are not included.

    A training is repeated if a missing measurement needs its weights.

    Example: `gambeson study import claims-small.jsonl.gz`
    """
    from gambeson import studies

    new, known, name = studies.import_cells(file, out)
    text = f"{new} results are new in {out / 'cells'}" + (f", {known} were there" if known else "")
    text += f"\nnext: gambeson report {out / name}" if name else ""
    _said(as_json, text, folder=str(out / "cells"), new=new, known=known, study=name)


def _said(as_json: bool, text: str, **content: Any) -> None:
    """Print a sentence, or what it says as JSON."""
    if as_json:
        print_json(content)
    else:
        typer.echo(text)


def _plan_table(found: StudyPlan) -> Table:
    from gambeson.base import duration

    table = Table(title=f"study {found.study}", box=box.SIMPLE_HEAD)
    for column in ("kind", "cells", "done", "each", "known from"):
        table.add_column(column, justify="left" if column in ("kind", "known from") else "right")
    for kind in found.kinds:
        each = "\N{EN DASH}" if kind.seconds is None else duration(kind.seconds)
        how = "finished cells" if kind.measured else "timed or counted steps"
        table.add_row(kind.name, str(kind.cells), str(kind.done), each, how)
    return table


def _show(found: StudyResult, as_json: bool) -> None:
    if as_json:
        print_json(found.plain())
        return
    console = plain_console()
    console.print(f"{found.done} of {found.cells} cells are done")
    for title, reason in found.failed.items():
        console.print(f"failed: {title}: {reason}", soft_wrap=True, highlight=False)
    for title, reason in found.damaged.items():
        console.print(f"damaged, made again by the next run: {title}: {reason}", soft_wrap=True, highlight=False)
    if not found.claims:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("claim", "equal", "data, model", "effect", "verdict"):
        table.add_column(column, overflow="fold")
    for claim in found.claims:
        for one in claim.findings:
            effect = "\N{EN DASH}" if one.effect is None else f"{one.effect:.3g}"
            effect += "" if one.low is None or one.high is None else f" [{one.low:.3g}, {one.high:.3g}]"
            table.add_row(claim.claim, claim.at, f"{one.data}, {one.model}", effect, one.words)
    console.print(table)
