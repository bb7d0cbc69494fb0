"""``gambeson report``: an HTML page from finished audits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gambeson.cli.options import Json, print_json


def report(
    audits: Annotated[list[Path], typer.Argument(help="Folders of finished audits on the same data.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output file (report.html in the first audit's folder)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page that opens offline.

    Example: `gambeson report runs/x-audit runs/y-audit --out report.html`
    """
    from gambeson.report import write

    page = write(audits, out or audits[0] / "report.html")
    if as_json:
        print_json({"report": str(page)})
    else:
        typer.echo(f"the report is in {page}")
