"""``gambeson uap``: crafting, scoring, printing and listing universal perturbations and patches."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gambeson.cli import options
from gambeson.cli.options import http_settings, needed, one_model, plain_console, print_json, progress, put, put_all
from gambeson.cli.tables import edits_table, placements_table, places_table

if TYPE_CHECKING:
    from gambeson.attacks import UniversalPerturbation
    from gambeson.data import Split
    from gambeson.evaluation import Difference, Rate, TargetSuccess, UapScore

app = typer.Typer(help="Craft, score and list universal perturbations and patches.", no_args_is_help=True)


@app.command("craft")
def craft(
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    budget: options.Budget = None,
    http: options.Http = None,
    attack: Annotated[
        str,
        typer.Option(
            help="A name of `gambeson list attacks`, or FILE.py:CLASS.", autocompletion=options.complete("attacks")
        ),
    ] = "stochastic-pgd",
    eps: options.Eps = None,
    norm: options.Norm = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to make the model predict: class:CLASS (a name or an index; #3 is index 3 if a class is named 3 "
            "too); for label maps also static:IMAGE (the index of a validation image, or a PNG of class indices) or "
            "hide:CLASS.",
            show_default="anything wrong",
        ),
    ] = None,
    set_: options.SetAttack = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file.")] = Path("uap.safetensors"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Craft a universal perturbation on train, and select it on validation.

    Example: `gambeson uap craft runs/x --eps 0.2 --set restarts=8 --out uap.safetensors`, or, for label maps,
    `gambeson uap craft runs/x --target hide:bag --set omega=0.9 --set tile="[32, 32]"`

    Example: `gambeson uap craft runs/x --attack universal-patch --set area=0.05 --out patch.safetensors`
    """
    from gambeson import attacks
    from gambeson.attacks.universal.procedural import ProceduralAttack
    from gambeson.base import UserError, eps_text, pick_device, unused, user_code
    from gambeson.evaluation import load_model
    from gambeson.threat import default_eps

    attacks.require_kind(attack, "universal")
    settings: dict[str, Any] = {}
    put(settings, "settings.eps", eps)
    put(settings, "settings.norm", norm)
    put(settings, "settings.target", target)
    put_all(settings, set_, (), lambda _: {"settings": attacks.entry(attack).settings})
    given = dict(settings.pop("settings", {}))
    if settings:
        raise UserError(f"there is no group of settings {next(iter(settings))!r}: write --set NAME=VALUE")
    lacks_eps = "eps" not in given and attacks.entry(attack).needs("eps")
    method = attacks.create(attack, **({"eps": 0.0} if lacks_eps else {}), **given)
    unused(out)
    source = needed(one_model(model, model_), "uap craft")
    with progress(as_json) as console:
        asked: dict[str, Any] = {
            "budget": budget,
            "http": http_settings(http),
            "gradients": attack if getattr(method, "gradients", False) else None,
        }
        subject = load_model(source, data, pick_device(device), **asked)
        if lacks_eps:
            method = attacks.create(attack, eps=default_eps(subject.dataset.test.shape, method.norm), **given)
        if budget is not None and isinstance(method, ProceduralAttack):
            most = method.asked(subject.dataset)
            if most > budget:
                raise UserError(
                    f"{attack} asks about {most} images, and the budget is {budget}: give fewer patterns or images by "
                    f"--set, or allow a larger --budget"
                )
        with user_code.blamed(method, f"the attack {attack!r}"):
            uap = method.craft(subject.model, subject.dataset, seed=seed)
        if not isinstance(uap, attacks.UniversalPerturbation):
            raise UserError(f"the attack {attack!r} returned a {type(uap).__name__}: expected a UniversalPerturbation")
        uap.save(out)
    if as_json:
        print_json({"file": str(out), **uap.about.plain()})
        return
    best = max(rate for _, rate in uap.about.restarts)
    told = "UER"
    if uap.target is not None:
        told = "mean of hidden and of others kept" if uap.target.kind == "hide" else "reached by"
        told = f"target {_aim(uap, subject.dataset.classes)}: {told}"
    size = f"at eps {eps_text(uap.about.eps)}"
    if isinstance(uap, attacks.AdversarialPatch):
        size = f"of {'x'.join(map(str, uap.mask.shape[2:]))} pixels, {100 * uap.area:.3g} % of an image"
    console.print(
        f"{out}: {user_code.short(attack)} {size} ({uap.about.status}); {told} {100 * best:.1f} % on validation"
    )
    if any(scale != 1 for scale in uap.about.temperature):
        scales = ", ".join(f"{scale:.3g}" for scale in uap.about.temperature)
        console.print(f"logits were divided by {scales} while crafting; --set temperature=1 leaves them as they are")
    command = ["gambeson", "uap", "score", str(out), source, *(["--data", data] if data else [])]
    console.print(f"next: {shlex.join(command)}", soft_wrap=True)


@app.command("score")
def score(
    file: Annotated[Path, typer.Argument(help="File of a perturbation.")],
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    budget: options.Budget = None,
    http: options.Http = None,
    edits: Annotated[
        str | None,
        typer.Option(
            help="Also under edits of the images: `standard`, or a list such as jpeg:75,shift:2,resize:0.5+jpeg:50.",
            show_default="none",
        ),
    ] = None,
    placements: Annotated[
        bool, typer.Option("--placements", help="For a patch: also score it on a grid of places, scales and angles.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Of a patch: write this HTML page about its placements.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Score a perturbation, or a patch, and its controls on the test split of any model.

    Example: `gambeson uap score uap.safetensors runs/x --edits standard`

    Example: `gambeson uap score patch.safetensors runs/x --placements`
    """
    from gambeson.attacks import AdversarialPatch, load
    from gambeson.base import UserError, pick_device, replaceable, writable
    from gambeson.evaluation import load_model, score_uap
    from gambeson.report import write_patch
    from gambeson.threat.edits import Edit

    uap = load(file)
    if not isinstance(uap, AdversarialPatch) and (placements or report):
        raise UserError(f"{file} holds a perturbation of whole images, which has no place: leave --placements out")
    if report is not None:
        writable(report.parent)
        replaceable(report, "an HTML page")
    asked = edits if edits in (None, "standard") else [Edit.parse(part) for part in edits.split(",")]
    source = needed(one_model(model, model_), f"uap score {file}")
    with progress(as_json) as console:
        subject = load_model(source, data, pick_device(device), budget=budget, http=http_settings(http))
        test = subject.dataset.test
        found = score_uap(subject.model, test, uap, edits=asked, placements=placements or report is not None, seed=seed)
        if isinstance(uap, AdversarialPatch) and found.placements is not None and report is not None:
            write_patch(uap, found.placements, test, report, seed=seed)
    if as_json:
        print_json({"file": str(file), **found.plain()})
        return
    _print_rates(console, found, test, of_class=isinstance(uap, AdversarialPatch) and uap.target is not None)
    if found.edits is not None:
        console.print(edits_table(found.edits))
        for text, why in found.edits.left_out.items():
            console.print(f"{text} was left out: {why}")
    if found.placements is not None:
        console.print(places_table(found.placements))
        console.print(placements_table(found.placements))
        console.print(found.placements.whole.comparison)
        if found.placements.left_out:
            console.print(f"larger than an image, and left out: {', '.join(found.placements.left_out)}")
    if report is not None:
        console.print(f"the report is in {report}")
    if found.target is not None:
        _print_target(console, _aim(uap, test.classes), found.target)
    if found.rival is not None:
        console.print(
            f"{found.rival.name} does no less harm, so this perturbation shows no weakness of its own: "
            "try other attacks"
        )


def _print_rates(console: Console, found: UapScore, test: Split, *, of_class: bool) -> None:
    if found.left_out:
        why = (
            "of the target's class, or crafted on" if of_class else "the perturbation was crafted on the same pictures"
        )
        console.print(f"{found.left_out} of the {len(test)} images of {test.name} were left out: {why}")
    rates: dict[str, Rate | Difference] = {"clean error": found.clean, "UER": found.uer, "fooling rate": found.fooling}
    if (maps := found.mean_iou) is not None:
        console.print(f"rates are of labelled pixels, their intervals over {found.uer.n} images")
        rates |= {"clean mean IoU": maps.clean, "mean IoU": maps.perturbed, "mean IoU lost": maps.lost}
    for name, rate in rates.items():
        console.print(f"{name:14} {rate}")
    for control in found.controls:
        console.print(f"{control.name:14} {control.worst} (worst of {control.draws}), mean {100 * control.mean:.1f} %")


def _aim(uap: UniversalPerturbation, classes: Sequence[str]) -> str:
    """Return what a perturbation is for, with the name of the class."""
    aim = uap.target
    return str(uap.about.settings["target"]) if aim is None or aim.kind == "static" else aim.called(classes)


def _print_target(console: Console, target: str, reached: TargetSuccess) -> None:
    console.print(f"{'target':14} {target}")
    console.print(f"{'target reached':14} {reached.success}; clean images: {reached.clean}")
    if reached.hidden is not None:
        console.print(f"{'hidden':14} {reached.hidden}")
        console.print(f"{'others kept':14} {reached.kept}")
    for one in reached.controls:
        parts = {"": one.success, ", hidden ": one.hidden, ", kept ": one.kept}
        text = "".join(f"{name}{rate}" for name, rate in parts.items() if rate is not None)
        console.print(f"{one.name}: {text} (best of {one.draws})")
    if (rival := reached.rival) is not None:
        console.print(f"{rival.name} reaches as much, so this perturbation shows no weakness of its own")


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="File of a patch.")],
    size: Annotated[str, typer.Option("--print", help="Length of its longer side in print: 50mm, 5cm or 2in.")],
    to: Annotated[Path, typer.Option(help="File to write, .png or .pdf.")],
    dpi: Annotated[int, typer.Option(min=1, help="Dots per inch.")] = 300,
    marks: Annotated[bool, typer.Option(help="Crop marks around it, and its size beside it.")] = True,
    as_json: options.Json = False,
) -> None:
    """Write a patch as a picture that prints at a given size.

    Example: `gambeson uap export patch.safetensors --print 50mm --to patch.pdf`
    """
    from gambeson.attacks import AdversarialPatch
    from gambeson.base import unused
    from gambeson.report import print_patch

    patch = AdversarialPatch.load(file)
    unused(to, "--to")
    height, width = print_patch(patch, to, size, dpi, marks=marks)
    if as_json:
        print_json({"file": str(to), "height": height, "width": width, "dpi": dpi})
        return
    pixels = "x".join(map(str, patch.mask.shape[2:]))
    typer.echo(f"{to}: {pixels} pixels as {height}x{width} dots, {size} at {dpi} dpi")
    typer.echo(f"it was crafted for {100 * patch.area:.3g} % of an image: print and photograph it at that share")


@app.command("list")
def list_(
    places: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    as_json: options.Json = False,
) -> None:
    """List perturbation files with their provenance.

    Example: `gambeson uap list runs`
    """
    from gambeson.attacks import load
    from gambeson.base import UserError, eps_text, user_code

    files = [file for place in places for file in (sorted(place.rglob("*.safetensors")) if place.is_dir() else [place])]
    named = {file for file in places if not file.is_dir()}
    found: list[tuple[Path, UniversalPerturbation]] = []
    for file in files:
        try:
            found.append((file, load(file)))
        except UserError:
            if file in named:  # folders may contain other files
                raise
    if as_json:
        print_json([{"file": str(file), **uap.about.plain()} for file, uap in found])
        return
    table = Table("file", "attack", "target", "eps", "norm", "crafted on", "seed", "status", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for file, uap in found:
        about = uap.about
        table.add_row(
            str(file),
            user_code.short(about.attack),
            "-" if about.settings.get("target") is None else str(about.settings["target"]),
            eps_text(about.eps),
            about.norm,
            about.crafted_split,
            str(about.seed),
            about.status,
        )
    plain_console().print(table)
