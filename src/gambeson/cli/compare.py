"""``gambeson compare``: did robustness regress?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from gambeson.cli import options
from gambeson.cli.gates import gate_table, leave
from gambeson.cli.options import print_json, progress

if TYPE_CHECKING:
    from gambeson.auditing.comparison import Change, Comparison


def compare(
    first: Annotated[str, typer.Argument(help="The earlier model: the folder of its audit, or a model to audit.")],
    second: Annotated[str, typer.Argument(help="The later one, likewise.")],
    data: options.Data = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Suite to audit models with: glance, quick, standard or full.", show_default="quick"),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", help="Conditions: no-regression, or changes: 'uer<=0.02, clean>=-0.01'. Exit code 3 if missed."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes for both audits: the suite is reduced to fit the audit of the first model into half of them, "
            "and the second model is audited in the same way.",
            show_default="no limit",
            metavar="N",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for comparison.json and the audits of models, first and second."),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare two models, image by image: clean, under one perturbation, and under per-image attacks.

    Changes are tested on the images that both audits report on (McNemar), for all rates at once. A model
    given beside an audit is audited in the same way. Audits that differ in data, eps or other settings are refused.

    Example: `gambeson compare runs/old-audit runs/new-audit --gate no-regression`
    """
    from gambeson.auditing import AuditResult, AuditRun, Suite, parse_gates, run_audit
    from gambeson.auditing import compare as compared
    from gambeson.auditing.audit import suite_named
    from gambeson.auditing.comparison import CHANGES
    from gambeson.base import UserError, pick_device, writable, write_json
    from gambeson.models.loading import trained_on

    if gate is not None:
        parse_gates(gate, CHANGES)
    if out is not None:
        writable(out)
    seen = [trained_on(model) for model in (first, second)]
    if data is None and None not in seen and seen[0] != seen[1]:
        raise UserError(f"the models are of other data ({seen[0]} and {seen[1]}): name those of both with --data")
    models = {"first": first, "second": second}
    folders = {name: Path(model) for name, model in models.items() if _is_audit(Path(model))}
    given = {"data": data if len(folders) == 2 else None, "suite": suite, "minutes": minutes}
    if folders and (unused := [f"--{name}" for name, value in given.items() if value is not None]):
        done = "both audits are finished, and nothing is measured"
        if len(folders) == 1:
            done = f"{next(iter(folders.values()))} is finished, and the other model is audited as it was"
        raise UserError(f"{' and '.join(unused)}: {done}; leave that out")
    with progress(as_json) as console:
        asked = suite_named(suite or ("quick" if minutes is None else None), None if minutes is None else minutes / 2)
        if len(folders) == 1:
            asked = Suite(**AuditResult.load(*folders.values()).settings)
        for name in [name for name in models if name not in folders]:
            run = AuditRun(model=models[name], data=data, suite=asked, seed=seed, device=pick_device(device))
            folders[name] = options.folder_beside(run.model, "audit") if out is None else out / name
            asked = Suite(**run_audit(run, folders[name]).results.settings)
        found = compared(folders["first"], folders["second"])
    if out is not None:
        write_json(out / "comparison.json", found.plain())
    report = None if gate is None else found.gate(gate)
    if as_json:
        print_json(found.plain() | ({} if report is None else {"gates": report.plain()["gates"]}))
    else:
        console.print(comparison_table(found, (first, second)))
        console.print(found.summary)
        for note in [*found.notes, *_unpaired(found.changes)]:
            console.print(f"note: {note}")
        if report is not None:
            console.print(gate_table(report, "gates of the comparison"))
    leave([] if report is None else [report])


def comparison_table(
    found: Comparison, names: Sequence[str] = (), columns: tuple[str, str] = ("first", "second")
) -> Table:
    """Return one row per rate: both models, the change with its interval, and its outcome.

    Args:
        found: the comparison.
        names: of the models, where their labels are the same.
        columns: headings of their rates.
    """
    labels = [found.first.label, found.second.label]
    called = " and ".join(names if names and labels[0] == labels[1] else labels)
    table = Table(
        title=f"{called}, on {found.material.name}: per cent [95 % interval]",
        box=box.SIMPLE_HEAD,
        caption="p: probability of so large a change by chance, for all rates at once",
    )
    for name in ("", *columns, "change", "p", "outcome"):
        table.add_column(name, justify="right" if name not in ("", "outcome") else "left", overflow="fold")
    for one in found.changes:
        ends, style = one.difference, {"worse": "bold red", "better": "green"}.get(one.outcome)
        change = f"{100 * ends.value:+.1f} [{100 * ends.low:+.1f}, {100 * ends.high:+.1f}]"
        rates = [f"{100 * rate.value:.1f}" for rate in (one.first, one.second)]
        table.add_row(one.name, *rates, change, f"{one.adjusted:.2g}", one.outcome, style=style)
    return table


def _is_audit(folder: Path) -> bool:
    """Whether a folder is that of an audit, finished or not."""
    return (folder / "result.json").is_file() or (folder / "state" / "stages.json").is_file()


def _unpaired(changes: Sequence[Change]) -> list[str]:
    """Say which rates were not compared image by image, by reason."""
    reasons: dict[str, list[str]] = {}
    for change in changes:
        if change.unpaired:
            reasons.setdefault(change.unpaired, []).append(change.name)
    return [
        f"{', '.join(names)}: compared by their intervals, which are wider, because {reason}."
        for reason, names in reasons.items()
    ]
