"""``gambeson audit``: audits of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from gambeson.cli.options import ConfigFile, Device, Json, Out, Set, folder_beside, print_json, progress, put, put_all
from gambeson.cli.tables import audit_table, plan_table


def audit(
    model: Annotated[str | None, typer.Argument(help="Folder of a training run, or another model: see above.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set (default: that of the training run).")] = None,
    suite: Annotated[
        str | None, typer.Option(help="quick, standard or full: from minutes to hours (standard).")
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(help="Radii of the curve, ascending, with commas: 4/255,8/255 (a grid for the data)."),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="inf or 2.")] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Black boxes: maximum number of images to query over the whole audit (no limit).", min=1),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(help="Model to transfer from: auto trains a small one, none omits transfer, or a model's name."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the model in tables.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print an upper bound on the cost and exit.")] = False,
    config: ConfigFile = None,
    set_: Set = None,
    out: Out = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw (0).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Audit a model: universal and per-image attacks, controls, diagnostics and a verdict.

    MODEL is the folder of a training run or a weights file (.safetensors); an architecture, whose weights come from a
    file as NAME@FILE.safetensors: a name of this library, torchvision:NAME, torchvision:NAME@WEIGHTS, timm:NAME,
    transformers:NAME, FILE.py:FUNCTION that returns a torch.nn.Module; a torch.export program (FILE.pt2); or a black
    box: FILE.onnx, function:FILE.py:FUNCTION from images to scores or classes, or http://HOST/PATH.

    Example: `gambeson audit runs/x --out runs/x-audit`

    Example: `gambeson audit http://localhost:8000/scores --data cifar10 --suite quick --budget 100000`
    """
    from gambeson.auditing import SUITES, AuditRun, plan_audit, run_audit
    from gambeson.auditing.run import images_asked
    from gambeson.base import UserError, pick_device, read_settings, unknown_name

    settings = read_settings(config, "audit") if config else {}
    for name, value in (("model", model), ("data", data), ("label", label), ("seed", seed)):
        put(settings, name, value)
    if suite is not None or isinstance(settings.get("suite", "standard"), str):
        chosen = suite or settings.get("suite", "standard")
        if chosen not in SUITES:
            raise unknown_name("suite", chosen, SUITES)
        settings["suite"] = SUITES[chosen].plain()
    if eps is not None:
        put(settings, "suite.eps", [part.strip() for part in eps.split(",")])
    put(settings, "suite.norm", norm)
    put(settings, "suite.budget", budget)
    put(settings, "suite.surrogate", surrogate)
    put_all(settings, set_)
    if device != "auto" or "device" not in settings:
        settings["device"] = pick_device(device)
    if "model" not in settings:
        raise UserError("no model was given: name the folder of a training run, for example gambeson audit runs/x")
    run = AuditRun(**settings)
    folder = out or folder_beside(run.model, "audit")
    with progress(as_json) as console:
        if only_plan:
            cost = plan_audit(run)
            print_json(cost.plain() | {"seconds": cost.seconds}) if as_json else console.print(plan_table(cost))
            return
        found = run_audit(run, folder)
    if as_json:
        print_json(found.results.plain())
        return
    console.print(audit_table([found.results]))
    console.print(found.verdict.summary)
    for note in found.results.notes:
        console.print(f"note: {note}")
    if found.results.subject.black_box:
        console.print(f"{images_asked(folder)} images queried in total")
    console.print(f"next: gambeson report {folder}")
