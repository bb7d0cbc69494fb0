"""The ``gambeson`` command, which turns errors into one sentence and an exit code.

No file of this package imports the library, and hence torch, before a command runs, so that help is fast.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import gambeson as gb
from gambeson.cli import (
    attack,
    audit,
    bench,
    compare,
    data,
    export,
    harden,
    options,
    report,
    study,
    testbed,
    train,
    uap,
    zoo,
)
from gambeson.cli.list import list_ as list_things

MISTAKE, STOPPED = 2, 130
"""Exit codes of an error that the user can fix, and of Ctrl-C as in shells."""

_ClickError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    help="Attack, harden and audit vision models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(report.quickstart)
app.command("list")(list_things)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("audit")(audit.audit)
app.command("compare")(compare.compare)
app.command("harden")(harden.harden)
app.command("attack")(attack.attack)
app.add_typer(uap.app, name="uap")
app.command("transfer")(attack.transfer)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("convert")(export.convert)
app.add_typer(testbed.app, name="testbed")
app.add_typer(bench.app, name="bench")
app.add_typer(study.app, name="study")
app.add_typer(zoo.app, name="zoo")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gambeson {gb.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of CPU threads (one per core); it affects rounding."),
    ] = None,
) -> None:
    """Attack, harden and honestly judge vision models."""
    _set_threads(threads)


def _set_threads(given: int | None) -> None:
    """Set the threads of torch before it is imported; how many may depend on the machine only, since rounding does.

    Threads that wait for each other sleep: by default they spin, which on a busy machine takes twenty times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given is not None:
        os.environ["OMP_NUM_THREADS"] = str(given)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(given)


def _threads_first(arguments: list[str]) -> list[str]:
    """Move --threads, which belongs to every command, to where the command line expects it."""
    for k, word in enumerate(arguments):
        if word.partition("=")[0] == "--threads":
            end = k + (1 if "=" in word else 2)
            return arguments[k:end] + arguments[:k] + arguments[end:]
    return arguments


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 an error that the user can fix, 130 stopped by Ctrl-C."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    if "torch" in sys.modules:
        from gambeson.base import leave_processes

        leave_processes()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code."""
    options.forget()
    warnings.formatwarning = _plain_warning
    try:
        code = app(args=_threads_first(arguments), prog_name="gambeson", standalone_mode=False) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except gb.UserError as error:
        return _refuse(options.sentence(error, arguments))
    except _ClickError as error:  # of the command line itself
        return _refuse(_click_sentence(error, arguments))
    except OSError as error:  # what no part of the library has foreseen, such as a folder in place of a file
        if error.errno is None:
            raise
        where = error.filename or "the output"
        return _refuse(f"{where}: {error.strerror}; name another file or folder, or make it accessible")
    if code == STOPPED:
        typer.echo("stopped: finished work is kept; the same command resumes from here", err=True)
    return code


def _refuse(sentence: str) -> int:
    typer.echo(f"error: {sentence}", err=True)
    return MISTAKE


def _click_sentence(error: Any, arguments: list[str]) -> str:
    """Return a mistake in the options as one sentence, led by the option as it was typed."""
    text = " ".join(error.format_message().split())
    if not text:  # a group of commands without one: its help was printed
        return "name a command"
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if parameter is not None and not text.startswith("Missing"):
        name, reason = parameter.name.upper(), " ".join(error.message.split()).removeprefix("Value error, ")
        for k, typed in enumerate(arguments):
            if typed.partition("=")[0] in parameter.opts:
                name = typed if "=" in typed else " ".join(arguments[k : k + 2])
        text = f"{name}: {reason.replace('Input should be ', 'expected ')}"
    else:
        text = f"{text[0].lower()}{text[1:]}"
    return f"{text.rstrip('.')}; `{context.command_path if context else 'gambeson'} --help` lists what there is"


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format the library's own warnings as sentences, without the line of code."""
    if category.__module__.startswith("gambeson.") or Path(filename).is_relative_to(Path(gb.__file__).parent):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
