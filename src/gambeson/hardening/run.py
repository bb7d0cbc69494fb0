"""Runs of ``gambeson harden``: settings, execution in a folder, and cost estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gambeson import data as data_room
from gambeson.auditing.clock import now
from gambeson.base import UserError, check_run, close_run, environment, open_run, read_json
from gambeson.evaluation import LoadedModel, load_model
from gambeson.evaluation.export_check import run_export
from gambeson.hardening.job import Job, black_box, hardened
from gambeson.hardening.result import Hardened
from gambeson.hardening.settings import Hardening, HardenPlan
from gambeson.models import PixelModel
from gambeson.models.export import TARGETS, Target
from gambeson.models.loading import asking
from gambeson.models.storage import FILE_NAME


class HardenRun(Hardening):
    """Settings of ``gambeson harden``."""

    kind: Literal["harden"] = "harden"
    model: str
    """What :func:`gambeson.evaluation.load_model` takes, except black boxes."""
    data: data_room.Name | None = None
    """Name of a data set; None: that of the training run."""
    to: Target | None = None
    """Also export the hardened model as this; see :func:`gambeson.models.export.export`."""
    device: str = "cpu"


def run_harden(run: HardenRun, out: Path, began: float | None = None) -> Hardened:
    """Execute ``run`` in the folder ``out``, or resume it there.

    Args:
        run: the settings.
        out: the folder.
        began: the beginning of its time, by :func:`gambeson.auditing.clock.now`; None: now.

    Raises:
        UserError: as :func:`harden`, or the folder holds another run, the model cannot be loaded, is a black box, or
            its export does not score as it does.
    """
    began = now() if began is None else began
    check_run(out, run)
    subject, job = _loaded(run, began)
    schedule = job.schedule(out)
    open_run(out, run, environment(run.device))
    found = hardened(job, schedule, out, f"{subject.label} before and after hardening, on {subject.dataset.name}")
    if run.to is not None:
        _export(run, run.to, run.data or subject.trained["data"], out)
    close_run(out)
    return found


def _export(run: HardenRun, to: Target, data: str, out: Path) -> None:
    """Export the hardened model, unless that was done and the check of the file was passed."""
    file = out / f"model-exported{TARGETS[to]}"
    checked = Path(f"{file}.json")
    if file.exists() and checked.is_file() and read_json(checked).get("agrees") is True:
        return
    file.unlink(missing_ok=True)
    found = run_export(str(out / FILE_NAME), to, file, data_name=data, seed=run.seed)
    if not found.agrees:
        raise UserError(
            f"{file} does not score as the hardened model does (largest difference of a logit "
            f"{found.largest_difference:.3g}): do not use it, and choose another --to; {checked} has the numbers"
        )


def plan_harden(run: HardenRun, out: Path | None = None, began: float | None = None) -> HardenPlan:
    """Measure what ``run`` will cost, on a few steps and batches; nothing is written.

    Args:
        run: the settings.
        out: the folder that it would be run in, which is checked too.
        began: as of :func:`run_harden`.

    Raises:
        UserError: as :func:`run_harden`.
    """
    if out is not None:
        check_run(out, run)
    return _loaded(run, now() if began is None else began)[1].plan()


def _loaded(run: HardenRun, began: float) -> tuple[LoadedModel, Job]:
    if not run.model.partition("?normalise=")[0].lower().endswith(".onnx") and asking(run.model, 1, None)["budget"]:
        raise black_box(run.model)
    subject = load_model(run.model, run.data, run.device)
    if run.to is not None and not isinstance(subject.model, PixelModel):
        raise UserError(f"{run.model} cannot be exported: leave --to out, or name the architecture with its weights")
    settings = {name: getattr(run, name) for name in Hardening.model_fields}
    return subject, Job(subject.model, subject.dataset, Hardening(**settings), began)
