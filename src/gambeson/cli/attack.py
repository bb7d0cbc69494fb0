"""``gambeson attack`` and ``gambeson transfer``: per-image attacks on one model, and between several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gambeson.cli import options
from gambeson.cli.options import chosen, needed, one_model, pairs, print_json, progress


def attack(
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    attack: options.Attack = None,
    eps: options.Eps = None,
    norm: options.Norm = None,
    eot_samples: options.EotSamples = None,
    images: options.Images = None,
    budget: options.Budget = None,
    http: options.Http = None,
    config: options.ConfigFile = None,
    set_: options.SetAttack = None,
    out: options.Out = None,
    seed: options.RunSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Attack a model with a per-image attack, or the suite `standard`; store the adversarial images.

    Other settings of the attack are given as --set NAME=VALUE.

    Example: `gambeson attack runs/x --attack pgd --eps 8/255 --set steps=100`
    """
    from gambeson.base import user_code
    from gambeson.evaluation import AttackRun, run_attack
    from gambeson.evaluation.attack_run import settings_of

    flags: dict[str, Any] = {
        "model": one_model(model, model_),
        "data": data,
        "attack": attack,
        "images": images,
        "budget": budget,
        "seed": seed,
        "settings.eps": eps,
        "settings.norm": norm,
        "settings.eot_samples": eot_samples,
    }
    settings = chosen(
        AttackRun,
        config,
        flags,
        pairs(set_, http),
        device,
        lambda now: {"settings": settings_of(now.get("attack"))},
    )
    needed(settings.get("model"), "attack")
    run = AttackRun(**settings)
    name = user_code.short(run.attack)
    folder = out or options.folder_beside(run.model, name)
    with progress(as_json) as console:
        result = run_attack(run, folder)
    if as_json:
        print_json(result.plain())
        return
    unit = "" if result.maps is None else "pixel "
    console.print(f"clean {unit}accuracy {result.clean}, under {name} {result.robust} of {result.robust.n} test images")
    if (maps := result.maps) is not None:
        console.print(
            f"clean mean IoU {maps.clean_mean_iou}, under {name} {maps.mean_iou}, and under no choice of these attacks "
            f"below {100 * maps.mean_iou_bound:.1f} %; mean over images of their pixel accuracy {maps.image_accuracy}"
        )
    of = f"{result.success.n} images that were" if result.maps is None else "pixels that were"
    console.print(
        f"{result.success} of the {of} correct when clean were broken; "
        f"norms at most {result.largest:.4g}, mean {result.mean:.4g}"
    )
    alone = (
        []
        if maps is None
        else [f"alone pixel accuracy {one.accuracy}, mean IoU {one.mean_iou}" for one in maps.attacks]
    )
    for k, part in enumerate(result.rounds):
        console.print(
            f"  {part.attack}: {alone[k] if alone else f'broke {part.broken} of {part.tried}'}, "
            f"{part.cost.forwards:,} forward and {part.cost.backwards:,} backward passes of single images"
        )
    console.print(f"results are in {folder}")


def transfer(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL...", help="Two models or more, as in `gambeson audit`.")
    ] = None,
    data: options.Data = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas.", show_default="fgsm,r-fgsm,step-ll,pgd,mi-fgsm"),
    ] = None,
    eps: options.Eps = None,
    norm: options.Norm = None,
    eot_samples: options.EotSamples = None,
    images: options.Images = None,
    budget: options.Budget = None,
    http: options.Http = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
    out: options.Out = None,
    seed: options.RunSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Craft examples on every model and score them on every other; the diagonal is the white box.

    Example: `gambeson transfer runs/x runs/y runs/z --eps 0.1 --out runs/transfer`
    """
    from gambeson.base import UserError, eps_text
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
        "budget": budget,
        "seed": seed,
    }
    settings = chosen(TransferRun, config, flags, pairs(set_, http), device, lambda _: {})
    if len(settings.get("models", ())) < 2:
        raise UserError("transfer needs two models or more: for example gambeson transfer runs/x runs/y --eps 0.1")
    if twice := next((one for one in settings["models"] if settings["models"].count(one) > 1), None):
        raise UserError(f"{twice} is given twice, and would be attacked by itself: name each model once")
    run = TransferRun(**settings)
    folder = out or Path("runs") / "transfer"
    with progress(as_json) as console:
        result = run_transfer(run, folder)
        page = write_transfer(result, folder / "transfer.html")
    if as_json:
        print_json(result.plain())
        return
    console.print(
        f"errors of the models in the columns, at eps {eps_text(result.eps)} (norm {run.norm}) [95 % interval]",
        markup=False,
    )
    for table in result.tables:
        shown = Table(f"{table.attack}: from", *result.labels, box=None)
        for label, row in zip(result.labels, table.errors, strict=True):
            shown.add_row(label, *("" if rate is None else str(rate) for rate in row))
        shown.add_row("worst of the others", *("" if rate is None else str(rate) for rate in table.worst))
        console.print(shown)
    unit = "" if result.unit == "image" else f" in {result.unit}s"
    console.print(f"clean errors{unit}: {', '.join(map(str, result.clean))}; the page is {page}")
