"""Studies on a Ray cluster: a task per cell, with the resources that the study states."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gambeson.base import OutOfSpace, UserError, say, task
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.runner import Runner, _threads, end_with_parent, time_left
from gambeson.studies.store import Estimates, Store
from gambeson.studies.study import Study

AHEAD = 2
"""Tasks given to the cluster per task that it can run at a time, so that no machine waits for the next one."""
PATIENCE = 600.0
"""Seconds that a lost cluster is waited for."""
_POLL, _AGAIN = 1.0, 5.0


def run(runner: Runner, address: str) -> list[Cell]:
    """Run a study on a cluster whose machines share the folder of results.

    A cell whose machine is lost is tried again elsewhere, as often as the study's resources say, and goes on from what
    it has stored. Ray ends every process that is connected to a cluster whose head is lost; so the connection is that
    of a process of its own, and this one waits for the head and goes on.

    Args:
        runner: as for one process.
        address: of the cluster; ``auto`` or ``local``.

    Returns:
        The cells that are left.

    Raises:
        UserError: Ray is not installed, there is no cluster, or its machines have other code or another folder.
        OutOfSpace: the disk is full; the study is intact.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs the package ray: pip install 'gambeson[ray]', or use --workers")
    total, left = len(runner.matrix.cells), runner.look()
    lost, known = None, False
    with task(f"study {runner.matrix.study.name}", total, done=total - len(left)) as advance:
        while left:
            said: list[tuple[str, str]] = []
            for one in _driven(runner, address):
                before, left = len(left), runner.look()
                said += one
                for _ in range(before - len(left)):
                    advance()
                    lost = None
            known = known or ("connected", "") in said
            word, fault = said[-1] if said and said[-1][0] != "connected" else ("lost", "its process was ended")
            if word == "done":
                break
            if word == "full":
                raise OutOfSpace(fault)
            if word == "refused" and not known:
                raise UserError(fault)
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE:
                raise UserError(f"the Ray cluster is lost ({fault}): start it, and run the study again")
            say("the Ray cluster does not answer: waiting for it")
            time.sleep(_AGAIN)
    return left


def _driven(runner: Runner, address: str) -> Iterator[list[tuple[str, str]]]:
    """Drive the cluster from another process; yield what that says, from time to time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    study = runner.matrix.study.model_dump_json()
    given = (study, runner.store.root, runner.device, time_left(runner), runner.run, address, theirs)
    process = context.Process(target=_drive, args=given, daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            alive = process.is_alive()
            try:
                said = [ours.recv()] if ours.poll(_POLL) else []
            except EOFError:  # it has said all
                process.join()
                said, alive = [], False
            yield said
            if not alive and not said:
                return
    finally:
        process.terminate()


def _drive(study: str, root: Path, device: str, left: float | None, run: str, address: str, pipe: Connection) -> None:
    end_with_parent()
    matrix, store = Matrix(Study.model_validate_json(study)), Store(root)
    deadline = None if left is None else time.monotonic() + left
    runner = Runner(matrix, store, device, deadline, Estimates(matrix, store, device).of, run)
    try:
        _connect(address)
        pipe.send(("connected", ""))
        while (waiting := runner.look()) and _round(runner, waiting):
            pass
        pipe.send(("done", ""))
    except ConnectionError as error:
        pipe.send(("lost", str(error)))
    except OutOfSpace as error:
        pipe.send(("full", str(error)))
    except UserError as error:
        pipe.send(("refused", str(error)))


def _round(runner: Runner, left: list[Cell]) -> bool:
    """Keep the cluster busy until nothing is ready or the time is over; return whether another look may help.

    Raises:
        ConnectionError: the cluster is lost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources = runner.matrix.study.resources
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 0}
    if resources.memory:
        options["memory"] = int(resources.memory * 2**30)
    remote = ray.remote(**options)(_task)
    study, root = runner.matrix.study.model_dump_json(), runner.store.root.absolute()
    running: dict[Any, Cell] = {}
    tried: set[str] = set()
    while True:
        try:
            room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1) / resources.cpus))
            for cell in left:
                if len(running) >= room:
                    break
                if cell.address not in tried and runner.ready(cell) and runner.fits(cell):
                    tried.add(cell.address)
                    running[remote.remote(study, root, cell.address, runner.device, runner.run)] = cell
            if not running:
                return any(runner.store.held(cell) for cell in left)
            done, _ = ray.wait(list(running), timeout=_POLL)
        except (RayError, OSError, RuntimeError) as error:
            raise ConnectionError(str(error).split("\n")[0]) from error
        for ref in done:
            cell = running.pop(ref)
            try:
                fault = ray.get(ref)
            except RayTaskError as error:
                runner.store.fail(cell, str(error.cause).split("\n")[0], runner.run, resources.retries + 1)
            except RayError as error:
                if not ray.is_initialized():
                    raise ConnectionError(str(error).split("\n")[0]) from error
                runner.crashed(cell, f"its machine or process was lost: {type(error).__name__}")
                tried.discard(cell.address)
            else:
                if fault is not None:
                    raise OutOfSpace(fault)
                tried.discard(cell.address)  # another runner may have had it, and died
        left = runner.look()
        if runner.deadline is not None and time.monotonic() > runner.deadline:
            for ref in running:
                ray.cancel(ref, force=True)
            return False


@lru_cache(1)
def _matrix(study: str) -> Matrix:
    return Matrix(Study.model_validate_json(study))


def _task(study: str, root: Path, address: str, device: str, run: str) -> str | None:
    """Do one cell on a machine of the cluster; return the fault if its disk is full."""
    matrix = _matrix(study)
    cell = next((one for one in matrix.cells if one.address == address), None)
    if cell is None:
        raise UserError(
            "this machine has another version of gambeson: install the same on every machine of the cluster"
        )
    if not (root / matrix.study.name).is_dir():
        raise UserError(f"this machine has no folder {root}: the machines of the cluster need a common file system")
    runner = Runner(matrix, Store(root), device, run=run)
    runner.look()
    with _threads(matrix.study, device):
        try:
            runner.attempt(cell)
        except OutOfSpace as error:
            return str(error)
    return None


def _connect(address: str) -> None:
    """Connect to the cluster.

    Raises:
        UserError: it does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        where = {} if address == "local" else {"address": address}
        ray.init(**where, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, or give --ray local"
        ) from None
