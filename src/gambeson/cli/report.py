"""``gambeson report`` and ``gambeson quickstart``: an HTML page, from finished audits or from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from gambeson.cli import gates
from gambeson.cli.options import Device, Json, Seed, plain_console, print_json, progress
from gambeson.cli.study import DEFAULT
from gambeson.cli.tables import audit_table

if TYPE_CHECKING:
    from gambeson.auditing import GateReport


def report(
    audits: Annotated[
        list[Path], typer.Argument(help="Folders of finished audits on the same data, or that of one study.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output file.", show_default="report.html in the first folder"),
    ] = None,
    as_json: Json = False,
    gate: gates.Gates = None,
    sarif: gates.Sarif = None,
    junit: gates.Junit = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="Write a fragment for a model card to this file, as Markdown.")
    ] = None,
) -> None:
    """Write one self-contained HTML page that opens offline, or judge and export finished audits.

    With --gate, --sarif, --junit or --card, the page is written only where --out asks for it. Nothing is measured.

    Example: `gambeson report runs/x-audit runs/y-audit --out report.html`

    Example: `gambeson report runs/x-audit --gate "uer<=0.2, trusted" --sarif audit.sarif --card card.md`

    Example: `gambeson report runs/studies/claims-small`
    """
    from gambeson.auditing import AuditResult
    from gambeson.base import UserError, replaceable, writable
    from gambeson.models.zoo import PREFIX
    from gambeson.report import write, write_card, write_study
    from gambeson.studies import is_study, read_study

    audits = [_folder(audit) for audit in audits]
    asked = gates.parsed(gate, sarif, junit, card)
    for audit in map(str, audits):
        if audit.startswith(PREFIX):
            raise UserError(
                f"{audit} is a model, not the folder of an audit: run gambeson audit {audit} and name its --out, or "
                f"read gambeson zoo show {audit.removeprefix(PREFIX)}"
            )
    if card is not None and len(audits) > 1:
        raise UserError(f"a card is about one model, and {len(audits)} audits were given: name one folder")
    others = [file for file in (sarif, junit, card) if file is not None]
    done: dict[str, Any] = {}
    if out is not None or not (asked or others):
        page = out or audits[0] / "report.html"
        writable(page.parent)
        replaceable(page, "an HTML page")
        study = len(audits) == 1 and is_study(audits[0])
        done["report"] = str(
            write_study(read_study(audits[0]), page, audits[0].parent) if study else write(audits, page)
        )
    console = plain_console(stderr=True, quiet=as_json)
    reports: list[GateReport] = []
    if asked or others:
        results = [AuditResult.load(folder) for folder in audits]
        reports = gates.evaluate(asked, audits, results, sarif, junit, console)
        if card is not None:
            write_card(results[0], card)
        if asked:
            done["gates"] = {str(folder): one.plain()["gates"] for folder, one in zip(audits, reports, strict=True)}
    if as_json:
        print_json(done | ({"files": [str(file) for file in others]} if others else {}))
    for file in [*([page] if "report" in done else []), *others] if not as_json else []:
        typer.echo(f"the report is in {file}")
    gates.leave(reports)


def _folder(given: Path) -> Path:
    """Return the folder of results that was named, or that of a study's file."""
    from gambeson.base import UserError
    from gambeson.base.files import read_yaml
    from gambeson.studies import Study, is_study

    if not given.is_file():
        return given
    if given.suffix not in (".yaml", ".yml"):
        raise UserError(f"{given} is a file: name the folder of a finished audit, or of a study")
    if read_yaml(given).get("kind") != "study":
        raise UserError(f"{given} is no study: name the folder of a finished audit, or of a study")
    name = Study.load(given).name
    if not is_study(DEFAULT / name):
        raise UserError(
            f"{DEFAULT / name} has no results of this study: name the folder that they are in, as OUT/{name}, or begin "
            f"with `gambeson study run {given}`"
        )
    return DEFAULT / name


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
        console.print(Text.assemble((result.subject.label, "bold"), f": {result.verdict.summary}"))
    console.print(f"open {page}")
