"""``gambeson train``: training with or without a defence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gambeson.cli.options import ConfigFile, Device, Json, Norm, Out, RunSeed, Set, chosen, print_json, progress
from gambeson.cli.tables import duration

if TYPE_CHECKING:
    from gambeson.data import Dataset
    from gambeson.training import TrainingCost

GREY_EPS, COLOUR_EPS = 0.2, 8 / 255


def train(
    data: Annotated[str | None, typer.Option(help="Data set; see `gambeson data list`.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture, such as lenet or resnet20.")] = None,
    defense: Annotated[
        str | None, typer.Option(help="A name of `gambeson list defenses`, or FILE.py:CLASS (standard).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, crop, crop-flip or imagenet.")] = None,
    eps: Annotated[
        str | None,
        typer.Option(help="Radius, such as 0.2 or 8/255 (those are the defaults for grey and colour)."),
    ] = None,
    norm: Norm = None,
    sharedness: Annotated[int | None, typer.Option(help="Images that share a perturbation.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Weight of the adversarial risk.")] = None,
    init: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print an estimate of the cost and exit.")] = False,
    config: ConfigFile = None,
    set_: Set = None,
    out: Out = None,
    seed: RunSeed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a model with or without a defence.

    Flags override the YAML of --config; both build the same validated settings, which are stored in run.yaml.

    Example: `gambeson train --data fashion-mnist --model lenet --defense shared-adversarial --epochs 2 --out runs/x`
    """
    from gambeson.base import UserError, user_code
    from gambeson.data import load
    from gambeson.models.loading import input_shape
    from gambeson.training import TrainRun, plan_training, run_training

    flags: dict[str, Any] = {
        "data": data,
        "model": model,
        "seed": seed,
        "init": None if init is None else str(init),
        "recipe.epochs": epochs,
        "recipe.batch_size": batch_size,
        "recipe.lr": lr,
        "recipe.augment": augment,
        "defense": _defense_of(config, defense),
        "defense.eps": eps,
        "defense.norm": norm,
        "defense.sharedness": sharedness,
        "defense.sigma": sigma,
    }
    settings = chosen(config, "train", flags, set_, device)
    if "data" not in settings or "model" not in settings:
        missing = " and ".join(f"--{name}" for name in ("data", "model") if name not in settings)
        raise UserError(f"{missing} must be given: name one, for example --data fashion-mnist --model lenet")
    with progress(as_json) as console:
        dataset = load(settings["data"], input_shape=input_shape(settings["model"]))
        _default_eps(settings["defense"], dataset)
        run = TrainRun(**settings)
        name = user_code.short(settings["defense"]["name"])
        if only_plan:
            cost = plan_training(run, dataset)
            print_json(cost.plain() | {"memory": cost.memory}) if as_json else console.print(_words(cost, name))
            return
        folder = out or Path("runs") / f"{user_code.short(run.data)}-{run.model}-{name}".replace(":", "-").replace(
            "/", "-"
        )
        trained = run_training(run, folder, dataset)
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if as_json:
        print_json({"out": str(folder), "metrics": history})
        return
    accuracy = history[-1]["validation_accuracy"]
    console.print(
        f"{trained.card.name} with {name} is in {folder}: "
        f"{100 * accuracy:.1f} % validation accuracy after {len(history)} epochs"
    )
    console.print(f"next: gambeson audit {folder}")


def _words(cost: TrainingCost, name: str) -> str:
    megabytes = [round(size / 2**20) for size in (cost.memory, cost.weights, cost.activations, cost.data)]
    return (
        f"{name}: {cost.steps} steps of {cost.seconds_a_step:.3g} s are about {duration(cost.seconds)} on "
        f"{cost.device}; a step costs {cost.plain_ratio:.2f} times a step of standard training; memory about "
        f"{megabytes[0]} MiB "
        f"(weights and moments {megabytes[1]}, activations {megabytes[2]}, images {megabytes[3]})"
    )


def _defense_of(config: Path | None, name: str | None) -> dict[str, Any]:
    """The defence of the file, or one with defaults if another is named."""
    from gambeson.base import read_settings

    stored = (read_settings(config, "train") if config else {}).get("defense", {})
    stored = {"name": stored} if isinstance(stored, str) else dict(stored)
    if name is None:
        return {"name": "standard", **stored}
    return {**stored, "name": name} if _same(name, stored.get("name", "standard")) else {"name": name}


def _same(name: str, other: str) -> bool:
    """Whether two names refer to the same class, ignoring stored hashes."""
    from gambeson.base import user_code

    if user_code.is_spelling(name) and user_code.is_spelling(other):
        return user_code.parts(name) == user_code.parts(other)
    return name == other


def _default_eps(defense: dict[str, Any], dataset: Dataset) -> None:
    """Set the default eps for the data if a defence needs one and none was given."""
    from gambeson.defenses import needs_eps

    if "eps" not in defense and needs_eps(defense["name"]):
        defense["eps"] = GREY_EPS if dataset.in_channels == 1 else COLOUR_EPS
