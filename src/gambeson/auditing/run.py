"""Runs of ``gambeson audit``: settings, execution in a folder, and cost estimates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from gambeson import data as data_room
from gambeson.auditing.audit import Audit, diagnostics_of, run_stages
from gambeson.auditing.budget import changes, fit_queries
from gambeson.auditing.clock import Clock, now
from gambeson.auditing.context import Checkpoints
from gambeson.auditing.cost import AuditPlan, plan
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.gates import NO_MAPS, Gate, refuse_unmeasured
from gambeson.auditing.stages import certified, own, per_image, surrogate
from gambeson.auditing.stages.black_box import queries_file
from gambeson.auditing.suite import SUITES, Suite
from gambeson.base import (
    Config,
    Label,
    UserError,
    check_run,
    close_run,
    environment,
    open_run,
    read_json,
    unknown_name,
    user_code,
)
from gambeson.base.errors import some
from gambeson.evaluation import BlackBox, LoadedModel, load_model
from gambeson.models import fingerprint
from gambeson.models.black_box.http import StoredHttp
from gambeson.models.loading import check_source


def _read_suite(value: Any) -> Any:
    if not isinstance(value, str | dict) or (isinstance(value, dict) and "name" not in value):
        return value
    given = {"name": value} if isinstance(value, str) else dict(value)
    name = given.pop("name")
    if name not in SUITES:
        error = unknown_name("suite", str(name), SUITES)
        raise UserError(str(error), ("name",), str(error))
    return Suite(**(SUITES[name].plain() | given))


AuditSuite = Annotated[Suite, BeforeValidator(_read_suite)]
"""A suite, its name or its settings, or both, such as ``{name: quick, sample: 50}``."""


class AuditRun(Config):
    """Settings of an audit: model, data and suite."""

    kind: Literal["audit"] = "audit"
    model: str
    """What :func:`gambeson.evaluation.load_model` takes: a run folder, a weights file, an architecture, a program, or
    a black box."""
    http: StoredHttp = None
    """How a server is asked."""
    data: data_room.Name | None = None
    """Name of a data set; None: that of the training run."""
    suite: AuditSuite = SUITES["standard"]
    """The suite's name or its settings, or both, such as ``{name: quick, sample: 50}``."""
    label: Label | None = None
    """Name of the model in tables; None: that of its defence, or of its file."""
    seed: int = 0
    device: str = "cpu"


def run_audit(
    run: AuditRun,
    out: Path,
    dataset: data_room.Dataset | None = None,
    *,
    gates: Sequence[Gate] = (),
    began: float | None = None,
) -> Audit:
    """Execute ``run`` in the folder ``out``, or resume it there; a finished one is only loaded.

    Args:
        run: the settings.
        out: the folder of the audit.
        dataset: the data, if already loaded.
        gates: conditions on its numbers, which are refused before it begins where it will not have these.
        began: the beginning of its time, by :func:`gambeson.auditing.clock.now`; None: now.

    Raises:
        UserError: the folder contains another run or the audit of other weights, the model cannot be loaded, the data
            is unknown, a black box's budget is spent, or a gate is about something that is not measured.
    """
    began = now() if began is None else began
    begun = check_audit(run, out)  # before anything is loaded: a finished audit needs no queries
    if begun and (done := Audit.finished(out)):
        _check_weights(run, out, dataset)
        return done
    left = _left(run, out)
    subject = load_model(run.model, run.data, run.device, dataset, budget=left, http=run.http)
    if begun is None and left is not None:  # report a budget that is too small before creating the folder
        fit_queries(run.suite.on(subject.dataset), subject.dataset, left, 1, keep_eps=bool(run.suite.eps))
    surrogate.check(run.suite, subject.dataset, subject.model)
    certified.check(run.suite.on(subject.dataset), subject.dataset, subject.model)
    _check_gates(gates, run, subject)
    clock = None
    if run.suite.minutes is not None:
        clock = Clock(run.suite.minutes, subject.model, subject.dataset, run.suite, seed=run.seed, began=began)
        if begun is None:  # likewise
            clock.choose()
    open_run(out, run, environment(run.device))
    found = run_stages(
        subject.model,
        subject.dataset,
        run.suite,
        out,
        seed=run.seed,
        label=run.label or subject.label,
        defense=subject.trained.get("defense"),
        epochs=subject.trained.get("recipe", {}).get("epochs"),
        clock=clock,
    )
    close_run(out)
    return found


def _check_weights(run: AuditRun, out: Path, dataset: data_room.Dataset | None) -> None:
    """Refuse to take a finished audit for one of weights that have changed since, unless they cannot be loaded now."""
    begun = Checkpoints(out).kept("begun") or {}
    if "model" not in begun:  # a black box
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when it was audited
        try:
            model = load_model(run.model, run.data, "cpu", dataset).model
        except UserError:
            return
    if fingerprint(model) != begun["model"]:
        raise UserError(f"{out} holds the audit of other weights of {run.model}: choose another --out")


def _check_gates(gates: Sequence[Gate], run: AuditRun, subject: LoadedModel) -> None:
    suite, missing = run.suite.on(subject.dataset), {}
    if subject.dataset.test.task.per_image_label:
        missing["maps"] = NO_MAPS
    if not suite.eps_adv or isinstance(subject.model, BlackBox):
        missing["eps_adv"] = "eps_adv will not be searched: it needs a model with gradients, and eps_adv in the suite"
    if suite.checks != "all":
        missing["trusted"] = "no audit is trusted whose suite leaves checks out: choose one with all of them"
    if not suite.noise_sizes:
        missing["corruption"] = "the suite has no noise: choose one with noise_sizes"
    if (why := surrogate.choose(suite, subject.dataset)[1]) and not suite.attacks:
        missing["transfer"] = why.removesuffix(".")
    every = diagnostics_of(suite)
    left_out = [one.name for one in every if one in DIAGNOSTICS and not suite.runs(one.name)]
    missing |= {f"check:{name}": "the suite leaves this check out: choose a larger one" for name in left_out}
    tried = per_image.names(suite, subject.dataset, black_box=isinstance(subject.model, BlackBox))
    tried += [user_code.short(name) for name in suite.attacks]
    for gate in gates:
        if gate.metric == "per_image" and gate.of not in tried and (gate.of or not tried):
            missing[f"per_image:{gate.of}"] = (
                f"the audit will have no such attack per image, but {some(tried) or 'none'}"
            )
    refuse_unmeasured(gates, suite.eps, [check.name for check in every], missing)


def check_audit(run: AuditRun, out: Path | None) -> bool | None:
    """Refuse what can be refused before a model or data are loaded; see :func:`gambeson.base.check_run`."""
    diagnostics_of(run.suite)
    own.of(run.suite)
    if run.suite.surrogate not in ("auto", "none"):
        check_source(run.suite.surrogate)
    check_source(run.model)
    return None if out is None else check_run(out, run)


def plan_audit(run: AuditRun, out: Path | None = None) -> AuditPlan:
    """Estimate the maximum cost of ``run`` from a few images; nothing is written.

    Args:
        run: the settings.
        out: the folder that it would be run in, which is checked too.

    Raises:
        UserError: as :func:`run_audit`, or the model is a black box.
    """
    check_audit(run, out)
    subject = load_model(run.model, run.data, run.device)
    if run.suite.minutes is None:
        return plan(subject.model, subject.dataset, run.suite, run.seed)
    clock = Clock(run.suite.minutes, subject.model, subject.dataset, run.suite, seed=run.seed)
    suite = clock.choose()
    found = plan(subject.model, subject.dataset, suite, run.seed, clock.rest.speed)
    made = changes(clock.asked, suite)
    return found.model_copy(update={"notes": (f"The time makes the audit smaller: {made}.",) if made else ()})


def images_asked(out: Path) -> int:
    """Return the number of images the black box of this folder was queried with; 0 without one."""
    file = queries_file(out)
    return int(read_json(file)["images"]) if file.is_file() else 0


def _left(run: AuditRun, out: Path) -> int | None:
    if run.suite.budget is None:
        return None
    left = run.suite.budget - images_asked(out)
    if left < 1:
        raise UserError(
            f"{out} has spent its budget of {run.suite.budget} images: give a larger --budget, and it goes on"
        )
    return left
