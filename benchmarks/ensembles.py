"""A training step of five LeNet members against one member's: ``python benchmarks/ensembles.py``.

Ways: the members in turn, on threads, stacked by vmap, and stacked by grouped convolutions written by hand (what vmap
turns into, without its dispatch). Every round times every way once, in turn; medians and minima of the rounds. One
member has all threads to itself. Processor seconds stand beside: they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson.base import environment, write_json
from gambeson.data import Split
from gambeson.defenses import Batch, Defense, TrainContext
from gambeson.defenses.ensemble import Ensemble
from gambeson.defenses.jacobian import Jacobian
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.defenses.pgd_adversarial import Standard
from gambeson.models import PixelModel
from gambeson.models.factory import ensemble

MEMBERS, BATCH = 5, 128


def made(name: str, members: int) -> PixelModel:
    """Return a fresh model on grey images of 28 x 28."""
    torch.manual_seed(0)
    return ensemble([gb.models.create(name, in_channels=1, classes=10, image_size=28).train() for _ in range(members)])


def data(members: int) -> Batch:
    """Return a batch of every member's."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(members * BATCH, 1, 28, 28, generator=draw)
    return Batch(images=images, labels=torch.randint(0, 10, (members * BATCH,), generator=draw), seed=0)


def stepper(name: str, defense: Defense, members: int) -> Callable[[], None]:
    """Return one training step as the loop takes it."""
    model, batch = made(name, members), data(members)
    train = Split("bench", batch.images, batch.labels)
    context = TrainContext(model=model, train=train, seed=0, epochs=1, steps=10, batch_size=BATCH)
    objective = defense.build_objective(context)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        for losses, _ in objective.optimizer_steps(model, batch):
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()

    return step


def grouped(name: str) -> Callable[[], None]:
    """Return one step of all members by grouped convolutions and batched products."""
    model, batch = made(name, MEMBERS), data(MEMBERS)
    states = [dict(voter.body.named_parameters()) for voter in model.voters]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    five = name == "lenet5"
    linear = ["fc1", "fc2", "fc3"] if five else ["fc1", "fc2"]

    def step() -> None:
        weights = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        h = batch.images.unflatten(0, (MEMBERS, BATCH)).transpose(0, 1).flatten(1, 2)
        for layer, padding in (("conv1", 2 if five else 0), ("conv2", 0)):
            kernel, bias = weights[f"{layer}.weight"].flatten(0, 1), weights[f"{layer}.bias"].flatten()
            h = F.conv2d(h, kernel, bias, padding=padding, groups=MEMBERS)
            h = F.relu(F.max_pool2d(h, 2))
        h = h.unflatten(1, (MEMBERS, -1)).transpose(0, 1).flatten(2)
        for layer in linear:
            h = torch.baddbmm(weights[f"{layer}.bias"].unsqueeze(1), h, weights[f"{layer}.weight"].transpose(1, 2))
            h = h if layer == linear[-1] else F.relu(h)
        optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(h.flatten(0, 1), batch.labels) * MEMBERS).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/bench-ensembles.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in ("lenet", "lenet5"):
        for kind in ("plain", "jacobian"):
            ways = _ways(name, kind)
            wall: dict[str, list[float]] = {way: [] for way in ways}
            processor: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(arguments.rounds + 1):
                for way, step in ways.items():
                    began, used = time.perf_counter(), time.process_time()
                    step()
                    if number:  # the first round warms up
                        wall[way].append(time.perf_counter() - began)
                        processor[way].append(time.process_time() - used)
            one, least, cost = (statistics.median(wall["one"]), min(wall["one"]), statistics.median(processor["one"]))
            for way in ways:
                row = {
                    "model": name,
                    "objective": kind,
                    "way": way,
                    "seconds": statistics.median(wall[way]),
                    "ratio": statistics.median(wall[way]) / one,
                    "ratio_of_minima": min(wall[way]) / least,
                    "ratio_of_processor_seconds": statistics.median(processor[way]) / cost,
                }
                rows.append(row)
                print(
                    f"{name:7} {kind:9} {way:8} {statistics.median(wall[way]) * 1e3:7.1f} ms  x {row['ratio']:.2f} "
                    f"(minima x {row['ratio_of_minima']:.2f}, processor x {row['ratio_of_processor_seconds']:.2f})",
                    flush=True,
                )
    content = {"members": MEMBERS, "batch_size": BATCH, "threads": arguments.threads, "rounds": arguments.rounds}
    content |= {"rows": rows, "load_average": os.getloadavg(), "environment": environment()}
    write_json(arguments.out, content)


def _ways(name: str, kind: str) -> dict[str, Callable[[], None]]:
    single: Defense = Standard() if kind == "plain" else Jacobian()
    ways = {"one": stepper(name, single, 1)}
    for way in ("loop", "threads", "stacked"):
        settings = {"members": MEMBERS, "at_once": way, "watched": 0}
        many = Ensemble(**settings) if kind == "plain" else JacobianEnsemble(**settings)
        ways[way] = stepper(name, many, MEMBERS)
    if kind == "plain":
        ways["grouped"] = grouped(name)
    return ways


if __name__ == "__main__":
    main()
