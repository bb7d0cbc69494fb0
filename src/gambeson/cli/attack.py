"""``gambeson attack``: per-image attacks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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
    folder_beside,
    print_json,
    progress,
)


def attack(
    model: Annotated[str | None, typer.Option(help="Folder of a training run, or its model.safetensors.")] = None,
    data: Data = None,
    attack: Annotated[
        str | None, typer.Option(help="standard, a name of `gambeson list attacks`, or FILE.py:CLASS (pgd).")
    ] = None,
    eps: Eps = None,
    norm: Norm = None,
    eot_samples: EotSamples = None,
    images: Annotated[int | None, typer.Option(help="Test images to attack, a stratified sample (1000).")] = None,
    config: ConfigFile = None,
    set_: Set = None,
    out: Out = None,
    seed: RunSeed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Attack a model with a per-image attack or the standard suite; store the adversarial images.

    Other settings of the attack are given as --set settings.NAME=VALUE.

    Example: `gambeson attack --model runs/x --data cifar10 --attack pgd --eps 8/255`
    """
    from gambeson.base import UserError, user_code
    from gambeson.evaluation import AttackRun, run_attack

    flags: dict[str, Any] = {
        "model": model,
        "data": data,
        "attack": attack,
        "images": images,
        "seed": seed,
        "settings.eps": eps,
        "settings.norm": norm,
        "settings.eot_samples": eot_samples,
    }
    settings = chosen(config, "attack", flags, set_, device)
    if "model" not in settings:
        raise UserError("no model was given: name the folder of a training run, for example --model runs/x")
    run = AttackRun(**settings)
    name = user_code.short(run.attack)
    folder = out or folder_beside(run.model, name)
    with progress(as_json) as console:
        result = run_attack(run, folder)
    if as_json:
        print_json(result.plain())
        return
    console.print(f"clean accuracy {result.clean}, under {name} {result.robust} of {result.robust.n} test images")
    console.print(
        f"{result.success} of the {result.success.n} images that were correct when clean were broken; "
        f"norms at most {result.largest:.4g}, mean {result.mean:.4g}"
    )
    for part in result.rounds:
        console.print(
            f"  {part.attack}: broke {part.broken} of {part.tried}, "
            f"{part.cost.forwards:,} forwards and {part.cost.backwards:,} backwards of an image"
        )
    console.print(f"results are in {folder}")
