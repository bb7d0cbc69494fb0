"""``gambeson transfer``: transfer tables between models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gambeson.cli.options import (
    ConfigFile,
    Data,
    Device,
    EotSamples,
    Eps,
    Json,
    Norm,
    Out,
    RunSeed,
    Set,
    chosen,
    print_json,
    progress,
)


def transfer(
    models: Annotated[
        list[str] | None, typer.Argument(help="Two models or more: run folders or other sources.")
    ] = None,
    data: Data = None,
    attacks: Annotated[
        str | None, typer.Option(help="Names, separated by commas (fgsm,r-fgsm,step-ll,pgd,mi-fgsm).")
    ] = None,
    eps: Eps = None,
    norm: Norm = None,
    eot_samples: EotSamples = None,
    images: Annotated[int | None, typer.Option(help="Test images, a stratified sample (1000).")] = None,
    config: ConfigFile = None,
    set_: Set = None,
    out: Out = None,
    seed: RunSeed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Craft examples on every model and score them on every other; the diagonal is the white box.

    Example: `gambeson transfer runs/x runs/y runs/z --eps 0.1 --out runs/transfer`
    """
    from gambeson.base import UserError
    from gambeson.evaluation import TransferRun, run_transfer
    from gambeson.report import write_transfer

    flags: dict[str, Any] = {
        "models": models or None,
        "data": data,
        "attacks": None if attacks is None else [name.strip() for name in attacks.split(",")],
        "eps": eps,
        "norm": norm,
        "eot_samples": eot_samples,
        "images": images,
        "seed": seed,
    }
    settings = chosen(config, "transfer", flags, set_, device)
    if len(settings.get("models", ())) < 2 or "eps" not in settings:
        raise UserError(
            "transfer needs two models or more and --eps: for example gambeson transfer runs/x runs/y --eps 0.1"
        )
    run = TransferRun(**settings)
    folder = out or Path("runs") / "transfer"
    with progress(as_json) as console:
        result = run_transfer(run, folder)
        page = write_transfer(result, folder / "transfer.html")
    if as_json:
        print_json(result.plain())
        return
    for table in result.tables:
        shown = Table(f"{table.attack}: from", *result.labels, box=None)
        for label, row in zip(result.labels, table.errors, strict=True):
            shown.add_row(label, *("" if rate is None else str(rate) for rate in row))
        shown.add_row("worst of the others", *("" if rate is None else str(rate) for rate in table.worst))
        console.print(shown)
    console.print(f"clean errors: {', '.join(map(str, result.clean))}; the page is {page}")
