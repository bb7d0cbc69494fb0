"""``gambeson export``: export of models to run without this library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gambeson.cli import options
from gambeson.cli.options import needed, one_model, print_json, progress

if TYPE_CHECKING:
    from gambeson.evaluation import Exported


def export(
    model: options.Model = None,
    model_: options.ModelOption = None,
    to: Annotated[
        str | None,
        typer.Option(help="torch-export, onnx or safetensors.", show_default="by the end of --out, else torch-export"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write.", show_default="named after the model"),
    ] = None,
    data: options.Data = None,
    images: Annotated[
        int | None, typer.Option(help="Test images to score at most, a stratified sample.", show_default="all")
    ] = None,
    votes: Annotated[int, typer.Option(help="Passes per image, where the model is random.")] = 10,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Export a model, including noise and vote, to run without gambeson, and score it against the original.

    Example: `gambeson export runs/x --to onnx --out x.onnx`
    """
    from gambeson.base import UserError, unknown_name, writable
    from gambeson.evaluation.export_check import run_export
    from gambeson.models.export import TARGETS

    run = needed(one_model(model, model_), "export")
    ends = {end: name for name, end in TARGETS.items()}
    named = ends.get("" if out is None else out.suffix)
    to = to or named or "torch-export"
    if to not in TARGETS:
        raise unknown_name("export target", to, TARGETS)
    if named not in (None, to):
        raise UserError(f"--to {to} came with --out {out}, whose name is that of {named}: leave one of them out")
    if out is None:
        if not Path(run).exists():
            raise UserError(
                f"no file was named for the export of {run}: name one, for example --out model{TARGETS[to]}"
            )
        out = Path(f"{run.removesuffix('/')}{TARGETS[to]}")
    writable(out.parent)
    with progress(as_json) as console:
        found = run_export(run, to, out, data_name=data, images=images, votes=votes, seed=seed)
    if as_json:
        print_json(found.plain())
    else:
        console.print(_words(found, out), highlight=False)
    if not found.agrees:
        raise UserError(
            f"{out} does not score as {run} does (largest difference of a logit {found.largest_difference:.3g}): "
            f"do not use it; {out}.json has the numbers"
        )


def _words(found: Exported, out: Path) -> str:
    accuracy = "an accuracy" if found.unit == "image" else f"a {found.unit} accuracy"
    text = (
        f"{out} has {accuracy} of {found.exported} on {found.exported.n} test images, the original {found.original}; "
        f"the largest difference of a logit is {found.largest_difference:.3g}"
    )
    if found.votes > 1:
        ratio = 0.0 if found.spread_ratio is None else found.spread_ratio
        text += (
            f" (means over {found.votes} passes; two sets of the original's passes differ by {found.by_chance:.3g}; "
            f"its spread over passes is {ratio:.2f} times the original's)"
        )
    if found.to == "safetensors":
        text += "\nthe file contains only weights: pixel mean and std, noise and vote are in its metadata"
    return text


def convert(
    file: Annotated[Path, typer.Argument(help="Weights: .pth, .pt, .ckpt, .bin or .safetensors.")],
    to: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    key: Annotated[
        str | None, typer.Option(help="Where in FILE the weights are, such as ema (the only place).")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the weights of a checkpoint as safetensors; nothing in the checkpoint runs.

    Example: `gambeson convert checkpoint.pth --to model.safetensors`
    """
    from gambeson.models.storage import convert as convert_weights

    lines = convert_weights(file, to, key)
    if as_json:
        print_json({"file": str(to), "notes": lines})
        return
    for line in lines:
        typer.echo(line)
    typer.echo(
        f"next: gambeson audit torchvision:resnet18@{to} --data NAME; or with another architecture or FILE.py:FUNCTION"
    )
