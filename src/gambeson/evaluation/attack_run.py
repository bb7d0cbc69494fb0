"""Runs of ``gambeson attack``: settings, execution, and the run folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gambeson import attacks
from gambeson.base import (
    Config,
    UserError,
    check_run,
    close_run,
    environment,
    open_run,
    read_json,
    save_tensors,
    user_code,
    writable,
    write_json,
)
from gambeson.data import Dataset, Name
from gambeson.evaluation.attack_suite import SuiteResult, run_suite, standard_suite, suite_for
from gambeson.evaluation.segmentation_suite import class_pixels
from gambeson.models.black_box.http import StoredHttp
from gambeson.models.loading import load_model
from gambeson.tasks import CLASSIFICATION
from gambeson.threat import default_eps
from gambeson.victim import as_victim

_SCORED, _INSPECTED = 2, 50
"""Queries beside an attack's: per image for its clean and its final answer, and for inspections of the model."""
FILE = "adversarial.safetensors"
STANDARD = "standard"


class AttackRun(Config):
    """Settings of a run: model, data, attack and number of images."""

    kind: Literal["attack"] = "attack"
    model: str
    """What :func:`gambeson.evaluation.load_model` takes."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of images sent to a black box."""
    http: StoredHttp = None
    """How a server is asked."""
    data: Name | None = None
    """Name of a data set; None: that of the training run."""
    attack: attacks.Name = "pgd"
    """Name of an attack that perturbs image by image, ``FILE.py:CLASS`` of one, which is stored with the hash of the
    file, or ``standard`` for the suite of :func:`standard_suite`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the attack, such as eps."""
    images: Annotated[int, Field(ge=1)] = 1000
    """Maximum number of test images, a stratified sample drawn from the seed."""
    seed: int = 0
    device: str = "cpu"

    @property
    def lacks_eps(self) -> bool:
        """Whether the attack cannot be built without an eps, and none was given."""
        return "eps" not in self.settings and (self.attack == STANDARD or attacks.entry(self.attack).needs("eps"))

    def with_eps(self, eps: float) -> AttackRun:
        """The run with an eps."""
        return self.model_copy(update={"settings": {"eps": eps, **self.settings}})


_SUITE = ("eps", "norm", "queries", "faithful", "eot_samples")


def settings_of(attack: str | None) -> Iterable[str]:
    """Return the names of the settings of an attack, by default of a run's default one, or of the standard suite."""
    if attack == STANDARD:
        return _SUITE
    return attacks.entry(attack or AttackRun.model_fields["attack"].default).settings


def _attacks_of(run: AttackRun, data: Dataset | None = None) -> dict[str, Any]:
    """Return the attacks by name; of label maps the runs of SEA one by one, since the mean IoU chooses among them."""
    task = CLASSIFICATION if data is None else data.test.task
    if run.attack != STANDARD:
        attacks.require_kind(run.attack, "image")
        attack = attacks.create(run.attack, **run.settings)
        if data is None or task.per_image_label or not isinstance(attack, attacks.SEA):
            return {user_code.short(run.attack): attack}
        return dict(attack.each(attack.class_pixels or class_pixels(data.train, seed=run.seed)))
    if unknown := sorted(set(run.settings) - set(_SUITE)):
        reason = f"the suite takes {', '.join(_SUITE)}, got {', '.join(unknown)}"
        raise UserError(reason, ("settings", unknown[0]), reason)
    return standard_suite(**run.settings) if data is None else suite_for(data, seed=run.seed, **run.settings)


def _norm(row: dict[str, Any], without: str) -> str:
    """Return the norm of the attacks, or ``without`` where they have none."""
    return str(getattr(next(iter(row.values())), "norm", without))


def _check_budget(budget: int | None, row: dict[str, Any], images: int) -> None:
    """Refuse a budget that the attacks may exceed, before they ask."""
    for name, attack in row.items():
        queries = getattr(attack, "queries", None)
        if budget is None or queries is None or (most := images * (queries + _SCORED) + _INSPECTED) <= budget:
            continue
        few = budget - _INSPECTED
        ways = {
            "attack {} of them at most": few // (queries + _SCORED),
            "give queries = {} at most": few // images - _SCORED,
        }
        advice = [way.format(number) for way, number in ways.items() if number > 0]
        raise UserError(
            f"{name} may ask {queries} queries for each of {images} images, {most} with their scoring, and the budget "
            f"is {budget}: {', or '.join([*advice, 'allow a larger --budget'])}"
        )


def run_attack(run: AttackRun, out: Path) -> SuiteResult:
    """Execute ``run``; write ``result.json`` and the perturbed images to ``out``.

    Raises:
        UserError: the folder holds another run, the model cannot be loaded, or a setting is wrong.
    """
    row = _attacks_of(run.with_eps(0.0) if run.lacks_eps else run)  # what is wrong is said before anything is loaded
    writable(out) if run.lacks_eps else check_run(out, run)
    needing = next((name for name, attack in row.items() if getattr(attack, "gradients", False)), None)
    subject = load_model(run.model, run.data, run.device, budget=run.budget, http=run.http, gradients=needing)
    if run.lacks_eps:
        run = run.with_eps(default_eps(subject.dataset.test.shape, _norm(row, "inf")))
    row = _attacks_of(run, subject.dataset)
    _check_budget(run.budget, row, min(run.images, len(subject.dataset.test)))
    if open_run(out, run, environment(run.device)) and (out / "result.json").is_file():
        return SuiteResult(**read_json(out / "result.json")["result"])
    rows = subject.dataset.test.sample_indices(run.images, seed=run.seed)
    split = subject.dataset.test.subset(rows)
    with as_victim(subject.model, fast=True) as victim:
        found = run_suite(victim, split, row, norm=_norm(row, "2"), seed=run.seed)
        notes = victim.notes
    if found.result.success.n == 0:
        warnings.warn(
            f"none of the {len(split)} images was right before the attack, so that it broke nothing: check that data, "
            "classes and normalisation are those of the model",
            stacklevel=2,
        )
    tensors = {"images": found.images, "labels": split.labels, "broken_by": found.broken_by, "indices": rows}
    if found.iou_images is not None and found.iou_broken_by is not None:
        tensors |= {"iou_images": found.iou_images, "iou_broken_by": found.iou_broken_by}
    settings = {name: attack.plain() for name, attack in row.items()}
    save_tensors(out / FILE, tensors, {"attacks": settings})
    content = {
        "schema": "gambeson/attack-1",
        "run": run.plain(),
        "attacks": settings,
        "victim": notes,
        "result": found.result.plain(),
    }
    write_json(out / "result.json", content)
    close_run(out)
    return found.result
