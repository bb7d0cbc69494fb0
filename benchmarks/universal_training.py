"""Training against universal perturbations, side by side: ``python benchmarks/universal_training.py``.

Fashion-MNIST (10,000 training images), LeNet-5, equal epochs and optimiser, trained against eps 0.2. A row gives clean
accuracy, UER under strong stochastic PGD at three radii (crafted on train, restarts chosen on validation, reported on
test), accuracy under PGD-40, and the cost of a step: forwards and backwards of the batch, and its time over that of a
plain step, both taken in turns in this process. Cells that the results file holds already are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.defenses import Batch, Defense, PGDAdversarial, Scene, SharedAdversarial, Standard
from gambeson.defenses.universal_adversarial import UniversalAdversarial
from gambeson.defenses.universal_consistency import UniversalConsistency
from gambeson.evaluation.universal import accuracy_under
from gambeson.training import Recipe
from gambeson.victim import Victim

EPS, RADII = 0.2, (0.1, 0.2, 0.3)
RECIPE = Recipe(epochs=4, batch_size=64, lr=0.05)
ROWS: dict[str, tuple[Defense, int]] = {  # and what a step costs: as many forwards as backwards of the batch
    "standard": (Standard(), 1),
    "pgd-adversarial": (PGDAdversarial(eps=EPS), 5),
    "shared-adversarial s 16": (SharedAdversarial(eps=EPS, sharedness=16), 6),
    "shared-adversarial s 64": (SharedAdversarial(eps=EPS, sharedness=64), 6),
    "universal-adversarial alternating": (UniversalAdversarial(eps=EPS), 2),
    "universal-adversarial one-pass": (UniversalAdversarial(eps=EPS, update="one-pass"), 1),
    "universal-consistency": (UniversalConsistency(eps=EPS), 2),
}


def load() -> gb.data.Dataset:
    """Fashion-MNIST with its first 10,000 training images and its first 1,000 validation images."""
    data = gb.data.load("fashion-mnist")
    train, validation = data.train.subset(torch.arange(10_000)), data.validation.subset(torch.arange(1_000))
    return gb.data.Dataset(data.name, train, validation, data.test, data.classes)


def cell(data: gb.data.Dataset, defense: Defense, seed: int) -> dict[str, object]:
    """Train one model and judge it."""
    with seeded(seed, "model"):
        model = gb.models.create("lenet5", data)
    gb.train(model, data, defense, recipe=RECIPE, seed=seed)
    found: dict[str, object] = {"clean": gb.evaluation.accuracy(model, data).plain()}
    for eps in RADII:
        uap = StochasticPGD(eps=eps, steps=400, batch_size=64, restarts=2).craft(model, data, seed=seed)
        found[f"uer {eps}"] = gb.evaluation.universal_evasion(model, data, uap).plain()
    few = data.test.subset(torch.arange(1_000))
    with Victim(model, fast=True) as victim:
        found["pgd-40 at 0.1"] = accuracy_under(victim, few, PGD(eps=0.1, steps=40), seed).plain()
    return found


def step_times(data: gb.data.Dataset, rounds: int) -> dict[str, float]:
    """Time a step of every row over a plain one: medians of steps taken in turns, late in the training."""
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    works = {}
    for name, (defense, _) in ROWS.items():
        with seeded(0, "model"):
            model = gb.models.create("lenet5", data).train()
        scene = Scene(model=model, train=data.train, seed=0, epochs=1, steps=rounds * 4, batch_size=64)
        works[name] = model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), defense.open(scene)
    images, labels = data.train.take(slice(0, 64))
    for k in range(rounds):
        batch = Batch(images=images, labels=labels, seed=k, step=rounds * 3 + k, steps=rounds * 4)
        for name, (model, optimizer, objective) in works.items():
            began = time.process_time()
            for losses, _ in objective.phases(model, batch):
                optimizer.zero_grad(set_to_none=True)
                losses["loss"].backward()
                optimizer.step()
            objective.follow(batch)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: value / medians["standard"] for name, value in medians.items()}


def main() -> None:
    """Run what is missing, store each cell as it finishes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--out", type=Path, default=Path("results/universal-training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load()
    content = read_json(arguments.out) if arguments.out.is_file() else {"cells": {}}
    settings = {"eps": EPS, "recipe": RECIPE.plain(), "data": data.train.fingerprint}
    settings["rows"] = {name: defense.plain() for name, (defense, _) in ROWS.items()}
    old = content.get("settings", {})
    kept = {
        name: cells
        for name, cells in content["cells"].items()
        if {**old, "rows": old.get("rows", {}).get(name)} == {**settings, "rows": settings["rows"].get(name)}
    }
    content = {"settings": settings, "cells": kept, "environment": environment()}
    for seed in range(arguments.seeds):
        for name in arguments.rows:
            if str(seed) in kept.get(name, {}):
                continue
            began = time.process_time()
            found = cell(data, ROWS[name][0], seed)
            found["cpu seconds"] = time.process_time() - began
            kept.setdefault(name, {})[str(seed)] = found
            write_json(arguments.out, content)
            print(f"{name}, seed {seed}: {line([found])}", flush=True)
    ratios = step_times(data, 60)
    content["cost"] = {
        name: {"forwards and backwards": cost, "time of a step": ratios[name]} for name, (_, cost) in ROWS.items()
    }
    write_json(arguments.out, content)
    print(f"{'':34} cost  time  clean  {'  '.join(f'UER {eps}' for eps in RADII)}  PGD-40 at 0.1")
    for name, cells in kept.items():
        print(f"{name:34} {ROWS[name][1]:4} {ratios[name]:5.2f}  {line(list(cells.values()))}")


def line(cells: list[dict[str, object]]) -> str:
    """Means over the seeds, and the range of the UERs."""
    columns = ["clean", *(f"uer {eps}" for eps in RADII), "pgd-40 at 0.1"]
    values = {name: [cell[name]["value"] for cell in cells] for name in columns}  # type: ignore[index]
    return "  ".join(f"{statistics.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})" for found in values.values())


if __name__ == "__main__":
    main()
