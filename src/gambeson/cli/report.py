"""``gambeson report`` and ``gambeson quickstart``: an HTML page, from finished audits or from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gambeson.cli.options import Device, Json, Seed, print_json, progress
from gambeson.cli.tables import audit_table


def report(
    audits: Annotated[
        list[Path], typer.Argument(help="Folders of finished audits on the same data, or that of one study.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output file.", show_default="report.html in the first folder"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page that opens offline.

    Example: `gambeson report runs/x-audit runs/y-audit --out report.html`

    Example: `gambeson report runs/studies/claims-small`
    """
    from gambeson.base import writable
    from gambeson.report import write, write_study
    from gambeson.studies import is_study, read_study

    out = out or audits[0] / "report.html"
    writable(out.parent)
    page = write_study(read_study(audits[0]), out) if len(audits) == 1 and is_study(audits[0]) else write(audits, out)
    if as_json:
        print_json({"report": str(page)})
    else:
        typer.echo(f"the report is in {page}")


def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; an interrupted run resumes there.")] = Path(
        "runs/quickstart"
    ),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Craft a universal perturbation, harden the model, and report both: LeNet-5 on 5,000 digits, in minutes.

    The page in the output folder shows the first picture within seconds, and the full report at the end.

    Example: `gambeson quickstart --out runs/quickstart`
    """
    from gambeson import report, studies
    from gambeson.base import pick_device, writable

    writable(out)
    page, title = out / "report.html", "Gambeson quickstart: one pattern against three models"
    with progress(as_json) as console:

        def show(first: studies.FirstLook) -> None:
            report.write_first(first.examples, first.uap, (first.under, first.clean), first.classes, page, title=title)
            console.print(f"open {page}: what one pattern does to the first model; it turns into the full report")

        audits = studies.quickstart(out, seed, pick_device(device), started=show)
        folders = [out / f"{found.results.subject.label}-audit" for found in audits]
        report.write(folders, page, title=title)
    results = [found.results for found in audits]
    if as_json:
        print_json({"report": str(page), "audits": [result.plain() for result in results]})
        return
    console.print(audit_table(results))
    for result in results:
        console.print(f"[bold]{result.subject.label}[/bold]: {result.verdict.summary}")
    console.print(f"open {page}")
