"""An audit as one object: what YAML, flags and Python all build, and what its folder can be run again from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

from gambeson import data as data_room
from gambeson import models
from gambeson.attacks import UniversalPerturbation
from gambeson.base import Config, UserError, close_run, environment, open_run, read_settings, unknown_name
from gambeson.evaluation.audit import Audit, audit
from gambeson.evaluation.results import AuditResult
from gambeson.evaluation.suite import SUITES, Suite


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
    source = Path(run.model)
    if not source.exists():
        raise UserError(
            f"{source} does not exist: name the folder of a finished `gambeson train`, or a model.safetensors file"
        )
    trained = read_settings(source / "run.yaml", "train") if (source / "run.yaml").is_file() else {}
    name = run.data or trained.get("data")
    if name is None:
        raise UserError(f"{source} does not say what data its model was trained on: name it with --data")
    dataset = data_room.load(name) if dataset is None else dataset
    model = models.load(source).to(torch.device(run.device))
    card = model.card
    if card.classes != dataset.num_classes or card.in_channels != dataset.in_channels:
        raise UserError(
            f"the model takes {card.in_channels} channels and knows {card.classes} classes, but {name} has "
            f"{dataset.in_channels} channels and {dataset.num_classes} classes: choose data that fit the model"
        )
    if open_run(out, run.plain(), environment(run.device)):
        result = AuditResult.load(out)
        return Audit(result, [UniversalPerturbation.load(out / point.file) for point in result.universal])
    defense = trained.get("defense")
    label = run.label or (defense or {}).get("name") or source.stem
    epochs = trained.get("recipe", {}).get("epochs")
    found = audit(model, dataset, run.suite, out, seed=run.seed, label=label, defense=defense, epochs=epochs)
    close_run(out)
    return found
