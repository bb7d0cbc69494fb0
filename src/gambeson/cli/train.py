"""``gambeson train``: training with or without a defence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gambeson.cli import options
from gambeson.cli.options import chosen, print_json, progress, put

if TYPE_CHECKING:
    from gambeson.training import TrainingCost

HEAP = 4
"""Default sharedness of a defence on label maps, of which a batch has fewer than of images."""


def train(
    data: Annotated[
        str | None,
        typer.Option(help="Data set; see `gambeson list data`.", autocompletion=options.complete("data")),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Architecture, such as lenet; see `gambeson list models`.", autocompletion=options.complete("models")
        ),
    ] = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help="A name of `gambeson list defenses`, or FILE.py:CLASS.",
            show_default="standard",
            autocompletion=options.complete("defenses"),
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training split.", show_default="10; 30 for label maps")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step.", show_default="128; 32 for label maps")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="0.05; 0.004 with Adam for label maps")
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="none, crop, crop-flip or imagenet.", show_default="none; crop-flip for label maps"),
    ] = None,
    eps: options.Eps = None,
    norm: options.Norm = None,
    sharedness: Annotated[
        int | None,
        typer.Option(help="Images that share a perturbation.", show_default="the defence's own; 4 for label maps"),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Weight of the adversarial risk.", show_default="by the defence")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: FILE, FILE?normalise=imagenet.", show_default="random")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print an estimate of the cost and exit.")] = False,
    config: options.ConfigFile = None,
    set_: options.Set = None,
    out: options.Out = None,
    seed: options.RunSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Train a model with or without a defence.

    Flags override the YAML of --config; both build the same validated settings, which are stored in run.yaml. For label
    maps, settings that neither gives are those of the preset segmentation.

    Example: `gambeson train --data fashion-mnist --model lenet --defense shared-adversarial --epochs 2 --out runs/x`
    """
    from gambeson.base import UserError, count, user_code, writable
    from gambeson.data import load
    from gambeson.defenses import entry
    from gambeson.models.loading import input_shape
    from gambeson.threat import default_eps
    from gambeson.training import Recipe, TrainRun, plan_training, run_training
    from gambeson.training.recipe import fitted, recipe_for

    flags: dict[str, Any] = {
        "data": data,
        "model": model,
        "seed": seed,
        "init": init,
        "recipe.epochs": epochs,
        "recipe.batch_size": batch_size,
        "recipe.lr": lr,
        "recipe.augment": augment,
        "defense.name": defense,
        "defense.eps": eps,
        "defense.norm": norm,
        "defense.sharedness": sharedness,
        "defense.sigma": sigma,
    }

    settings = chosen(
        TrainRun,
        config,
        flags,
        set_,
        device,
        lambda now: {"recipe": {*Recipe.model_fields, "preset"}, "defense": entry(_name(now)).settings},
    )
    missing = " and ".join(f"--{name}" for name in ("data", "model") if name not in settings)
    if missing:
        raise UserError(f"{missing} must be given: name one, for example --data fashion-mnist --model lenet")
    put(settings, "defense.name", defense or _name(settings))
    with progress(as_json) as console:
        lacking = "eps" not in settings["defense"] and entry(settings["defense"]["name"]).needs("eps")
        if lacking:  # the default depends on the data, and what is wrong is said before they are loaded
            settings["defense"]["eps"] = 0.0
        run = TrainRun(**settings)
        name = user_code.short(settings["defense"]["name"])
        folder = out or Path("runs") / f"{user_code.short(run.data)}-{run.model}-{name}".replace(":", "-").replace(
            "/", "-"
        )
        writable(folder)
        dataset = load(run.data, input_shape=input_shape(run.model, run.data))
        if lacking:
            settings["defense"]["eps"] = default_eps(dataset.train.shape, getattr(run.defense, "norm", "inf"))
        if not dataset.train.task.per_image_label:
            settings["recipe"] = {"preset": "segmentation", **settings.get("recipe", {})}
            if "sharedness" in type(run.defense).model_fields:
                settings["defense"].setdefault("sharedness", HEAP)
        settings["recipe"] = fitted(recipe_for(run.defense, settings.get("recipe", {})), len(dataset.train))
        run = TrainRun(**settings)
        if only_plan:
            cost = plan_training(run, dataset, out)
            print_json(cost.plain() | {"memory": cost.memory}) if as_json else console.print(_words(cost, name))
            return
        trained = run_training(run, folder, dataset)
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if as_json:
        print_json({"out": str(folder), "metrics": history})
        return
    last = history[-1]
    iou = f", {100 * last['validation_mean_iou']:.1f} % mean IoU" if "validation_mean_iou" in last else ""
    console.print(
        f"{trained.card.name} with {name} is in {folder}: "
        f"{100 * last['validation_accuracy']:.1f} % validation accuracy{iou} after {count(len(history), 'epoch')}"
    )
    console.print(f"next: gambeson audit {folder}", soft_wrap=True)


def _name(settings: dict[str, Any]) -> str:
    """Return the name of the defence in the settings so far."""
    found = settings.get("defense", "standard")
    return str(found.get("name", "standard")) if isinstance(found, dict) else str(found)


def _words(cost: TrainingCost, name: str) -> str:
    from gambeson.base import duration

    megabytes = [round(size / 2**20) for size in (cost.memory, cost.weights, cost.activations, cost.data)]
    of = " of one of its networks" if cost.networks > 1 else ""
    return (
        f"{name}: {cost.steps} steps of {cost.seconds_a_step:.3g} s are about {duration(cost.seconds)} on "
        f"{cost.device}; a step costs {cost.plain_ratio:.2f} times a step of standard training{of}; memory about "
        f"{megabytes[0]} MiB (weights and moments {megabytes[1]}, activations {megabytes[2]}, images {megabytes[3]})"
    )
