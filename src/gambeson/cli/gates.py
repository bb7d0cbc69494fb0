"""Gates on the command line: options of several commands, the table of what came of them, and the exit code 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gambeson.auditing import AuditResult, GateReport
    from gambeson.auditing.gates import Gate

MISSED = 3
"""Exit code of a command whose gates were not all held."""

Gates = Annotated[
    list[str] | None,
    typer.Option("--gate", help="Conditions: 'uer<=0.2, clean>=0.9, trusted'. Exit code 3 if one is missed."),
]
Sarif = Annotated[
    Path | None, typer.Option("--sarif", help="Write failed checks and missed gates to this file, as SARIF 2.1.0.")
]
Junit = Annotated[
    Path | None, typer.Option("--junit", help="Write checks and gates as test cases to this file, as JUnit XML.")
]


def parsed(
    given: list[str] | None, sarif: Path | None = None, junit: Path | None = None, card: Path | None = None
) -> list[Gate]:
    """Read the gates of a command, and check that its files can be written, before it begins."""
    from gambeson.auditing import parse_gates
    from gambeson.base import UserError, replaceable, writable

    files = [file.absolute() for file in (sarif, junit, card) if file is not None]
    if len({*files}) < len(files):
        raise UserError(f"two kinds of results came for one file, among {', '.join(map(str, files))}: name one each")
    for kind, file in {"SARIF": sarif, "JUnit XML": junit, "a model card": card}.items():
        if file is not None:
            writable(file.parent)
            replaceable(file, kind)
    return [] if given is None else parse_gates(given)


def evaluate(
    gates: Sequence[Gate],
    folders: Sequence[Path],
    results: Sequence[AuditResult],
    sarif: Path | None,
    junit: Path | None,
    console: Console,
) -> list[GateReport]:
    """Judge the gates of every audit, write the files that were asked for, and print what came of it."""
    from gambeson.auditing import judge_gates
    from gambeson.auditing.display import doubt_of
    from gambeson.report.exchange import Finished, write_junit, write_sarif

    reports = [judge_gates(gates, result) for result in results]
    finished = [Finished(*each) for each in zip(folders, results, reports, strict=True)]
    if sarif is not None:
        write_sarif(finished, sarif)
    if junit is not None:
        write_junit(finished, junit)
    for result, report in zip(results, reports, strict=True):
        if gates:
            console.print(gate_table(report, f"gates of {result.subject.label}"))
        if gates and report.held and (doubt := doubt_of(result)):
            larger = "" if result.settings.get("checks", "all") == "all" else ", and audit with --suite quick or larger"
            console.print(f"note: the numbers are {doubt}, and no gate asks for that: add 'trusted'{larger}")
    return reports


def gate_table(report: GateReport, title: str) -> Table:
    """One row per gate: what was measured, what was required, and whether that holds."""
    from gambeson.auditing.gates import measured

    table = Table(title=title, box=box.SIMPLE_HEAD, min_width=60)
    for name in ("gate", "value [95 % interval]", "required", ""):
        table.add_column(name)
    for gate in report.gates:
        said = "held" if gate.held else " ".join(filter(None, ["MISSED", gate.reason and f"({gate.reason})"]))
        table.add_row(gate.gate, measured(gate), gate.required, said, style=None if gate.held else "bold red")
    return table


def leave(reports: Sequence[GateReport]) -> None:
    """End the command with exit code 3 where a gate was missed."""
    if not all(report.held for report in reports):
        raise typer.Exit(MISSED)
