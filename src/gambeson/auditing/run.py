"""An audit as one object: what YAML, flags and Python all build, and what its folder can be run again from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from gambeson import data as data_room
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.audit import Audit, audit
from gambeson.auditing.cost import AuditPlan, fit, plan
from gambeson.auditing.results import AuditResult
from gambeson.auditing.stages.black_box import queries_file
from gambeson.auditing.suite import SUITES, Suite
from gambeson.base import Config, UserError, close_run, environment, open_run, read_json, unknown_name
from gambeson.evaluation import load_model


def _read_suite(value: Any) -> Any:
    if isinstance(value, str):
        if value not in SUITES:
            raise unknown_name("suite", value, SUITES)
        return SUITES[value]
    return value


class AuditRun(Config):
    """What to audit, on what, and how thoroughly."""

    kind: Literal["audit"] = "audit"
    model: str
    """What :func:`gambeson.evaluation.load_model` takes: a run folder, a weights file, an architecture, a program, or
    a black box."""
    data: data_room.Name | None = None
    """Name of a data set; None: the one that the run was trained on."""
    suite: Annotated[Suite, BeforeValidator(_read_suite)] = SUITES["standard"]
    """The suite's name or its settings."""
    label: str | None = None
    """What tables call the model; None: the name of its defence, or of its file."""
    seed: int = 0
    device: str = "cpu"


def run_audit(run: AuditRun, out: Path, dataset: data_room.Dataset | None = None) -> Audit:
    """Carry out ``run`` in the folder ``out``, or go on with it there; a finished one is only loaded.

    Args:
        run: the settings.
        out: the folder of the audit.
        dataset: the data, where it is loaded already.

    Raises:
        UserError: the folder holds another run, the model cannot be loaded, no data is known, or a black box's budget
            was spent before.
    """
    began = (out / "run.yaml").is_file()  # then the folder is looked at first: a finished audit asks nobody
    if began and open_run(out, run, environment(run.device)):
        result = AuditResult.load(out)
        return Audit(result, [UniversalPerturbation.load(out / point.file) for point in result.universal])
    left = _left(run, out)
    subject = load_model(run.model, run.data, run.device, dataset, budget=left)
    if not began:
        if left is not None:  # a budget too small for anything is told before the folder is claimed
            fit(run.suite.on(subject.dataset), subject.dataset, left, 1)
        open_run(out, run, environment(run.device))
    found = audit(
        subject.model,
        subject.dataset,
        run.suite,
        out,
        seed=run.seed,
        label=run.label or subject.label,
        defense=subject.trained.get("defense"),
        epochs=subject.trained.get("recipe", {}).get("epochs"),
    )
    close_run(out)
    return found


def plan_audit(run: AuditRun, dataset: data_room.Dataset | None = None) -> AuditPlan:
    """Count and measure what ``run`` will cost, on a few images; nothing is written.

    Raises:
        UserError: the model cannot be loaded or is a black box, or no data is known.
    """
    subject = load_model(run.model, run.data, run.device, dataset)
    return plan(subject.model, subject.dataset, run.suite, run.seed)


def images_asked(out: Path) -> int:
    """Return how many images the black box of this folder was asked about so far; 0 where there is none."""
    file = queries_file(out)
    return int(read_json(file)["images"]) if file.is_file() else 0


def _left(run: AuditRun, out: Path) -> int | None:
    if run.suite.budget is None:
        return None
    left = run.suite.budget - images_asked(out)
    if left < 1:
        raise UserError(
            f"{out} has spent its budget of {run.suite.budget} images: start again with a larger --budget and another "
            "--out"
        )
    return left
