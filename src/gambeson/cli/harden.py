"""``gambeson harden``: fine-tuning of a trained model within a time and a loss of accuracy, and what it brought."""

from __future__ import annotations

import shlex
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gambeson.cli import options
from gambeson.cli.compare import comparison_table
from gambeson.cli.options import chosen, needed, one_model, print_json, progress

if TYPE_CHECKING:
    from gambeson.hardening import HardenPlan


def harden(
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for everything, about: half for the training, in whole epochs, a quarter for each audit.",
            show_default="no limit",
            metavar="N",
        ),
    ] = None,
    keep_accuracy: Annotated[
        float | None,
        typer.Option(help="Points of clean accuracy that may be lost, measured on validation.", show_default="1.0"),
    ] = None,
    eps: options.Eps = None,
    norm: Annotated[str | None, typer.Option(help="inf, 2, or, with --eps, 1.", show_default="inf")] = None,
    speed: Annotated[
        str | None, typer.Option(help="Maximum number of epochs: 10 (fast) or 40 (best).", show_default="best")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.05")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suite of both audits: glance, quick, standard or full; with --minutes, what of it fits.",
            show_default="quick; with --minutes full",
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Also export it: torch-export, onnx or safetensors.", show_default="no")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print an estimate of the cost and exit.")] = False,
    config: options.ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of training, defence or suite: momentum=0.8, radius=1.2"),
    ] = None,
    out: options.Out = None,
    seed: options.RunSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Harden a trained model: fine-tune it with the preset gambeson, and audit it before and after.

    MODEL is given as for `gambeson audit`, and must have weights: a black box is refused. The output folder gets the
    hardened model (model.safetensors, with weights called body.*; --to safetensors also writes them under the names of
    your network), a report on both audits (report.html) and the numbers (result.json). The epoch is selected on
    validation, among those that keep the accuracy and withstand more than the model as it came; if there is none,
    nothing is exported. A training that collapses is stopped with a reason.

    Example: `gambeson harden runs/x --minutes 10 --out runs/x-hardened`

    Example: `gambeson harden torchvision:resnet18@model.pth --data image-folder:photos --keep-accuracy 0.5`
    """
    began = monotonic()  # before the imports, which take seconds of --minutes
    from gambeson.auditing import Suite
    from gambeson.base import unknown_name
    from gambeson.defenses import Gambeson
    from gambeson.hardening import HardenRun, plan_harden, run_harden
    from gambeson.hardening.job import AFTER, BEFORE
    from gambeson.models.export import TARGETS
    from gambeson.training import Recipe

    if to is not None and to not in TARGETS:
        raise unknown_name("export target", to, TARGETS)
    flags: dict[str, Any] = {
        "model": one_model(model, model_),
        "data": data,
        "minutes": minutes,
        "keep_accuracy": keep_accuracy,
        "eps": eps,
        "norm": norm,
        "suite.name": suite,
        "defense.speed": speed,
        "recipe.lr": lr,
        "to": to,
        "seed": seed,
    }
    own = set(HardenRun.model_fields)
    groups = {"recipe": {*Recipe.model_fields}, "defense": {*Gambeson.model_fields}, "suite": {*Suite.model_fields}}
    settings = chosen(HardenRun, config, flags, set_, device, lambda _: {k: v - own for k, v in groups.items()})
    needed(settings.get("model"), "harden")
    run = HardenRun(**settings)
    with progress(as_json) as console:
        if only_plan:
            cost = plan_harden(run, out, began)
            print_json(cost.plain() | {"total": cost.total}) if as_json else console.print(_words(cost))
            return
        folder = out or options.folder_beside(run.model, "hardened")
        found = run_harden(run, folder, began)
    if as_json:
        print_json({"out": str(folder), **found.plain()})
        return
    console.print(comparison_table(found.comparison, columns=(BEFORE, AFTER)))
    for note in (found.choice, *found.notes):
        console.print(f"note: {note}")
    console.print(found.summary)
    file = folder / "model.safetensors"
    console.print(f"open {folder / 'report.html'}; the model is {file}", soft_wrap=True)
    if run.to != "safetensors":
        plain = f"gambeson export {shlex.quote(str(folder))} --to safetensors"
        console.print(f"its weights are called body.*; under the names of your network: {plain}", soft_wrap=True)


def _words(cost: HardenPlan) -> str:
    from gambeson.base import count, duration

    return (
        f"at most {count(cost.epochs, 'epoch')}, about {duration(cost.seconds)} with their validation, and two audits "
        f"of at most {duration(cost.audit.seconds)} each, on {cost.training.device}: {duration(cost.total)} together"
    )
