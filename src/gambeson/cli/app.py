"""The ``gambeson`` command, which turns errors into one sentence and an exit code.

No file of this package imports the library, and hence torch, before a command runs, so that help is fast.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import gambeson as gb
from gambeson.cli import attack, audit, bench, data, export, quickstart, report, testbed, train, transfer, uap
from gambeson.cli.list import list_ as list_things

MISTAKE, STOPPED = 2, 130
"""Exit codes of an error that the user can fix, and of Ctrl-C as in shells."""

app = typer.Typer(
    help="Attack, harden and audit vision models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.command("list")(list_things)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("audit")(audit.audit)
app.command("attack")(attack.attack)
app.add_typer(uap.app, name="uap")
app.command("transfer")(transfer.transfer)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("convert")(export.convert)
app.add_typer(testbed.app, name="testbed")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gambeson {gb.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Attack, harden and honestly judge vision models."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 an error that the user can fix, 130 stopped by Ctrl-C."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code."""
    warnings.formatwarning = _plain_warning
    try:
        app(args=arguments, prog_name="gambeson")
    except SystemExit as end:
        if end.code == STOPPED:
            typer.echo("stopped: finished work is kept; the same command resumes from here", err=True)
        return int(end.code or 0)
    except gb.UserError as error:
        typer.echo(f"error: {error}", err=True)
        return MISTAKE
    return 0


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format the library's own warnings as sentences, without the line of code."""
    if Path(filename).is_relative_to(Path(gb.__file__).parent):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
