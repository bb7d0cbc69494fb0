"""An audit as one object: what YAML, flags and Python all build, and what its folder can be run again from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from gambeson import data as data_room
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.audit import Audit, audit
from gambeson.auditing.results import AuditResult
from gambeson.auditing.suite import SUITES, Suite
from gambeson.base import Config, close_run, environment, open_run, unknown_name
from gambeson.evaluation import load_subject


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
    """A run folder of ``gambeson train``, or a weights file written by this library."""
    data: str | None = None
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
        UserError: the folder holds another run, the model cannot be loaded, or no data is known.
    """
    subject = load_subject(run.model, run.data, run.device, dataset)
    if open_run(out, run.plain(), environment(run.device)):
        result = AuditResult.load(out)
        return Audit(result, [UniversalPerturbation.load(out / point.file) for point in result.universal])
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
