"""``gambeson bench``: speed of attacks, universal perturbations, training and audits on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gambeson.cli import options
from gambeson.cli.options import Device, Json, needed, one_model, print_json, progress

if TYPE_CHECKING:
    from gambeson.studies import BenchResult

app = typer.Typer(
    help="Time attacks, universal perturbations, training and audits against plain loops.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Time attacks, universal perturbations, training and audits against plain loops."""


Model = Annotated[str, typer.Option(help="Architecture.")]
BatchSize = Annotated[int, typer.Option(help="Images.")]
Steps = Annotated[int, typer.Option(help="Steps of an attack.")]
Rounds = Annotated[int, typer.Option(help="Timed rounds.")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Time ours in bfloat16 as well.")]


def _new(out: Path | None) -> Path | None:
    """Refuse a file that exists before minutes are spent on timings."""
    from gambeson.base import unused

    if out is not None:
        unused(out)
    return out


OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.", callback=_new)]


def _against_a_loop(name: str, steps: int, told: str, example: str, loop: str) -> None:
    def command(
        model: Model = "resnet20",
        batch_size: BatchSize = 128,
        steps: Steps = steps,
        rounds: Rounds = 7,
        bfloat16: Bfloat16 = False,
        device: Device = "auto",
        out: OutFile = None,
        as_json: Json = False,
    ) -> None:
        from gambeson import studies
        from gambeson.base import pick_device

        settings = studies.BenchSettings(
            model=model,
            batch_size=batch_size,
            steps=steps,
            rounds=rounds,
            bfloat16=bfloat16,
            device=pick_device(device),
        )
        with progress(as_json):
            result = getattr(studies, f"bench_{name}")(settings)
        _show(result, out, as_json, loop)

    command.__doc__ = f"{told} and a plain loop alternately; report medians of ratios.\n\nExample: `{example}`"
    app.command(name)(command)


_against_a_loop("attacks", 10, "Time PGD", "gambeson bench attacks --rounds 7", "the bare loop")
_against_a_loop(
    "universal",
    10,
    "Time steps of a universal perturbation",
    "gambeson bench universal --model resnet18 --batch-size 256 --steps 50",
    "the bare loop",
)
_against_a_loop(
    "training",
    7,
    "Time a step of adversarial training",
    "gambeson bench training --model resnet18 --rounds 7",
    "the plain loop",
)


@app.command("audit")
def audit(
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    suite: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    batch_size: BatchSize = 128,
    rounds: Rounds = 7,
    seed: options.Seed = 0,
    device: Device = "auto",
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Time an audit and its stages, beside a plain loop of as many forwards and backwards.

    Example: `gambeson bench audit runs/x --suite quick`
    """
    from gambeson.auditing import AuditRun
    from gambeson.base import pick_device, write_json
    from gambeson.studies import bench_audit

    source = needed(one_model(model, model_), "bench audit")
    run = AuditRun(model=source, data=data, suite={"name": suite}, seed=seed, device=pick_device(device))
    with progress(as_json):
        found = bench_audit(run, batch_size=batch_size, rounds=rounds)
    if out is not None:
        write_json(out, found.plain())
    if as_json:
        print_json(found.plain())
        return
    table = Table("stage", "seconds", "share", box=None)
    for name, seconds in found.stages.items():
        table.add_row(name, f"{seconds:.2f}", f"{100 * seconds / found.seconds:.0f} %")
    console = options.plain_console()
    console.print(table)
    console.print(
        f"{found.seconds:.1f} s for {found.forwards} forwards and {found.backwards} backwards, which take "
        f"{found.least:.1f} s in a plain loop: {found.seconds / found.least:.2f} times that"
    )


def _show(result: BenchResult, out: Path | None, as_json: bool, base: str) -> None:
    from gambeson.base import write_json

    if out is not None:
        write_json(out, result.plain())
    if as_json:
        print_json(result.plain())
        return
    table = Table("", "seconds", f"of {base}", "smallest to largest", "images/s", "of peak", box=None)
    for timing in result.timings:
        span = f"{timing.ratio_low:.2f} to {timing.ratio_high:.2f}"
        rate, share = result.images_a_second(timing), result.share_of_peak(timing)
        row = (f"{timing.seconds:.3f}", f"{timing.ratio:.2f}", span, f"{rate:.0f}", f"{100 * share:.0f} %")
        table.add_row(timing.name, *row)
    console = options.plain_console()
    console.print(table)
    peaks = " and ".join(f"{peak / 1e9:.0f} GFLOP/s in {kind}" for kind, peak in result.peaks.items())
    console.print(f"medians; the peak is that of a large matrix product, {peaks}")
    if result.ideal is not None:
        console.print(f"by counting forwards and backwards, ours could be {result.ideal:.2f} times as fast")
