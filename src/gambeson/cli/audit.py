"""``gambeson audit``: audits of a model."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gambeson.cli import gates, options
from gambeson.cli.options import chosen, needed, one_model, pairs, print_json, progress
from gambeson.cli.tables import audit_table, plan_table

if TYPE_CHECKING:
    from rich.console import Console

    from gambeson.auditing import AuditResult


def audit(
    model: options.Model = None,
    model_: options.ModelOption = None,
    data: options.Data = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="How thorough, glance, quick, standard or full: minutes to hours.",
            show_default="standard; with --minutes full",
        ),
    ] = None,
    minutes: options.Minutes = None,
    eps: Annotated[
        str | None,
        typer.Option(help="Radii of the curve, ascending: 4/255,8/255.", show_default="five; one in glance"),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="inf or 2.", show_default="inf")] = None,
    budget: options.Budget = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="Model to transfer from: auto trains a small one (not in glance), none omits transfer; or a name.",
            show_default="auto",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the model in tables.", show_default="its defence or file")
    ] = None,
    class_wise: Annotated[
        bool | None,
        typer.Option("--class-wise", help="Also craft one perturbation for each class.", show_default="off"),
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print an upper bound on the cost and exit.")] = False,
    http: options.Http = None,
    config: options.ConfigFile = None,
    set_: options.SetSuite = None,
    out: options.Out = None,
    seed: options.RunSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    gate: gates.Gates = None,
    sarif: gates.Sarif = None,
    junit: gates.Junit = None,
) -> None:
    """Audit a model: universal and per-image attacks, controls, diagnostics and a verdict.

    MODEL is one of: the folder of a training run, or its weights file (.safetensors); an architecture with weights from
    a file, NAME@FILE (.safetensors, .pth, .pt, .ckpt, ...), where NAME is a name of this library, torchvision:NAME,
    timm:NAME, transformers:NAME, smp:NAME, or FILE.py:FUNCTION that returns a torch.nn.Module;
    torchvision:NAME@WEIGHTS; zoo:NAME; hf://OWNER/NAME or a folder with config.json; a torch.export program (FILE.pt2);
    FILE.onnx, a black box if it cannot be converted; a black box: http://HOST/PATH, or function:FILE.py:FUNCTION from
    images to scores or classes.
    If the network expects normalised pixels, append ?normalise=imagenet, data, none or MEAN,STD to a name with a file.

    Example: `gambeson audit runs/x --out runs/x-audit`

    Example: `gambeson audit runs/x --gate "uer<=0.2, clean>=0.9, trusted" --junit audit.xml`

    Example: `gambeson audit runs/x --minutes 10`, the most informative audit that fits; it says what was left out

    Example: `gambeson audit http://localhost:8000/scores --data cifar10 --suite quick --budget 100000`
    """
    began = monotonic()  # before the imports, which take seconds of --minutes
    from gambeson.auditing import AuditRun, Suite, plan_audit, run_audit

    asked = gates.parsed(gate, sarif, junit)
    flags: dict[str, Any] = {
        "model": one_model(model, model_),
        "data": data,
        "label": label,
        "seed": seed,
        "suite.name": suite or ("full" if minutes is not None and config is None else None),
        "suite.eps": None if eps is None else [part.strip() for part in eps.split(",")],
        "suite.minutes": minutes,
        "suite.norm": norm,
        "suite.budget": budget,
        "suite.surrogate": surrogate,
        "suite.class_wise": class_wise,
    }
    settings = chosen(AuditRun, config, flags, pairs(set_, http), device, lambda _: {"suite": Suite.model_fields})
    needed(settings.get("model"), "audit")
    run = AuditRun(**settings)
    with progress(as_json) as console:
        if only_plan:
            cost = plan_audit(run, out)
            print_json(cost.plain() | {"seconds": cost.seconds}) if as_json else console.print(plan_table(cost))
            for note in cost.notes:
                console.print(f"note: {note}")
            return
        folder = out or options.folder_beside(run.model, "audit")
        found = run_audit(run, folder, gates=asked, began=began)
    if not as_json:
        _show(found.results, folder, console)
    reports = gates.evaluate(asked, [folder], [found.results], sarif, junit, console)
    if as_json:
        print_json(found.results.plain() | (reports[0].plain() if asked else {}))
    gates.leave(reports)


def _show(result: AuditResult, folder: Path, console: Console) -> None:
    from gambeson.auditing.run import images_asked

    console.print(audit_table([result]))
    console.print(result.verdict.summary)
    for note in result.notes:
        console.print(f"note: {note}")
    if result.subject.black_box:
        console.print(f"{images_asked(folder)} images queried in total")
    console.print(f"next: gambeson report {folder}", soft_wrap=True)
