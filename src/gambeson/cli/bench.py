"""``gambeson bench``: how fast attacks and training are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gambeson.base import write_json
from gambeson.cli.options import Json, print_json, progress
from gambeson.studies.bench import BenchSettings, bench_attacks
from gambeson.studies.bench_training import TrainingBench, bench_training
from gambeson.studies.timing import Timing

app = typer.Typer(help="Time attacks and training side by side with the plain loops.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Time attacks and training side by side with the plain loops."""


@app.command("attacks")
def attacks(
    model: Annotated[str, typer.Option(help="Architecture.")] = "resnet20",
    batch_size: Annotated[int, typer.Option(help="Images.")] = 128,
    steps: Annotated[int, typer.Option(help="PGD steps.")] = 10,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Time ours in bfloat16 as well.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Time PGD against the plain loop, in turns; report medians of ratios.

    Example: `gambeson bench attacks --rounds 7`
    """
    with progress(as_json):
        result = bench_attacks(
            BenchSettings(model=model, batch_size=batch_size, steps=steps, rounds=rounds, bfloat16=bfloat16)
        )
    if out is not None:
        write_json(out, result.plain())
    if as_json:
        print_json(result.plain())
        return
    _show(result.timings, "the bare loop")


@app.command("training")
def training(
    model: Annotated[str, typer.Option(help="Architecture.")] = "resnet20",
    batch_size: Annotated[int, typer.Option(help="Images.")] = 128,
    steps: Annotated[int, typer.Option(help="PGD steps.")] = 7,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Craft in bfloat16 as well.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Time a step of adversarial training against the plain loop, in turns; report medians of ratios.

    Example: `gambeson bench training --rounds 7`
    """
    with progress(as_json):
        result = bench_training(
            TrainingBench(model=model, batch_size=batch_size, steps=steps, rounds=rounds, bfloat16=bfloat16)
        )
    if out is not None:
        write_json(out, result.plain())
    if as_json:
        print_json(result.plain())
        return
    _show(result.timings, "the plain loop")
    Console().print(f"by counting forwards and backwards, ours could be {result.ideal:.2f} times as fast")


def _show(timings: list[Timing], baseline: str) -> None:
    table = Table("", "seconds (median)", f"of {baseline} (median)", "smallest to largest", box=None)
    for timing in timings:
        span = f"{timing.ratio_low:.2f} to {timing.ratio_high:.2f}"
        table.add_row(timing.name, f"{timing.seconds:.3f}", f"{timing.ratio:.2f}", span)
    Console().print(table)
