"""Studies as commands: plan, run, and read what there is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gambeson.base import UserError, duration, say
from gambeson.studies import cluster, planning
from gambeson.studies.checks import check_names
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.planning import StudyPlan
from gambeson.studies.rows import StudyResult, collect, write_summary
from gambeson.studies.runner import FILE, Runner, prepare, run_workers
from gambeson.studies.store import Estimates, Store
from gambeson.studies.study import Study

ROOT = Path("runs/studies")
"""Default folder of studies, below which each has one of its name, and ``cells`` the results of all."""


def plan_study(study: Study, root: Path = ROOT, device: str = "cpu") -> StudyPlan:
    """Measure what a study will take on this machine; see :func:`gambeson.studies.planning.plan`."""
    check_names(study)
    return planning.plan(prepare(study, root), Store(root), device)


def run_study(
    study: Study,
    root: Path = ROOT,
    *,
    device: str = "cpu",
    workers: int = 0,
    ray: str | None = None,
    minutes: float | None = None,
) -> StudyResult:
    """Run what is missing of a study; what other runs, other studies and other runners have done is not done again.

    A run that was killed anywhere goes on; runners on one folder share the work.

    Args:
        study: the study.
        root: folder of studies; what several have in common is computed once below it.
        device: of the computations.
        workers: processes on this machine; 0: this one.
        ray: address of a Ray cluster, ``auto`` for the one that this machine belongs to, or ``local``, a new one on
            this machine.
        minutes: stop then; only cells that are expected to end in time are begun.

    Raises:
        UserError: a setting of a defence or a recipe is wrong, an architecture or a data set is unknown, Ray is
            missing, or the folder cannot be written.
        OutOfSpace: the disk is full; what is finished is kept.
    """
    if workers and ray is not None:
        raise UserError("--workers are processes on this machine, and --ray a cluster: give one of them")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    if ray is None:  # whose machines may have other data and packages than this one
        check_names(study)
    matrix, store = prepare(study, root), Store(root)
    runner = Runner(matrix, store, device, deadline, Estimates(matrix, store, device).of)
    before = None if minutes is None else len(runner.look())
    if ray is not None:
        cluster.run(runner, ray)
    elif workers:
        run_workers(runner, workers)
    else:
        runner.go()
    if minutes is not None and (left := runner.look()) and len(left) == before:
        _say_too_short(runner, left, minutes)
    result = collect(matrix, store)
    write_summary(result, root / study.name)
    return result


def _say_too_short(runner: Runner, left: Sequence[Cell], minutes: float) -> None:
    """Say what would have taken longer, where the time ended before any cell did."""
    following = next((cell for cell in left if runner.ready(cell)), None)
    if following is not None:
        takes = runner.seconds(following)
        expected = "takes a time that `gambeson study plan` measures" if takes is None else f"takes {duration(takes)}"
        say(f"no cell was finished in {duration(60 * minutes)}: the next one, {following.title}, {expected}")


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / FILE).is_file()


def read_study(source: Study | Path, root: Path | None = None) -> StudyResult:
    """Return all that a study has found so far; nothing is run.

    Args:
        source: the study, or its folder.
        root: folder of studies; of a study's folder, by default the one that it is in.

    Raises:
        UserError: the folder holds no study.
    """
    if isinstance(source, Path):
        if not is_study(source):
            raise UserError(f"{source} holds no study: name a folder that `gambeson study run` has written")
        return collect(Matrix(Study.load(source / FILE)), Store(root or source.parent))
    return collect(Matrix(source), Store(root or ROOT))
