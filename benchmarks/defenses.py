"""Every defence, side by side: ``python benchmarks/defenses.py``.

Fashion-MNIST (10,000 training images), LeNet-5, equal epochs and optimiser, trained against eps 0.2 where a defence
has one. A row gives clean accuracy, UER under strong stochastic PGD at three radii (crafted on train, chosen on
validation, reported on test), accuracy under PGD-40 and under the standard row of attacks (random models by the
majority of their draws), and the time of a step over that of a plain one, taken in turns in this process. Cells that
the results file holds already are not run again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.defenses import Defense, create
from gambeson.evaluation import accuracy_under, run_suite, standard_suite
from gambeson.training import Recipe, plan
from gambeson.victim import EOT_SAMPLES, Victim

EPS, RADII = 0.2, (0.1, 0.2, 0.3)
SUITE = 250  # images of the attack suite
RECIPE = Recipe(epochs=4, batch_size=64, lr=0.05)
NOISE = {"places": ("relu1",), "noise_from": 0}
ROWS: dict[str, Defense] = {
    "standard": create("standard"),
    "pgd-adversarial": create("pgd-adversarial", eps=EPS),
    "trades": create("trades", eps=EPS),
    "shared-adversarial s 16": create("shared-adversarial", eps=EPS, sharedness=16),
    "shared-adversarial s 64": create("shared-adversarial", eps=EPS, sharedness=64),
    "universal-adversarial alternating": create("universal-adversarial", eps=EPS),
    "universal-adversarial one-pass": create("universal-adversarial", eps=EPS, update="one-pass"),
    "universal-consistency": create("universal-consistency", eps=EPS),
    "ensemble-adversarial": create("ensemble-adversarial", eps=EPS, sources=("lenet5", "mnist-d")),
    "jacobian": create("jacobian", strength=0.01),
    "jacobian-ensemble 3": create("jacobian-ensemble", strength=0.01, members=3),
    "learn2perturb": create("learn2perturb", eps=EPS, **NOISE),
    "combination: consistency, jacobian": create(
        "combination",
        risk={"name": "universal-consistency", "eps": EPS},
        jacobian={"strength": 0.01},
    ),
}


def load() -> gb.data.Dataset:
    """Fashion-MNIST with its first 10,000 training images and its first 1,000 validation images."""
    data = gb.data.load("fashion-mnist")
    train, validation = data.train.subset(torch.arange(10_000)), data.validation.subset(torch.arange(1_000))
    return gb.data.Dataset(data.name, train, validation, data.test, data.classes)


@functools.cache
def source(data: gb.data.Dataset, name: str) -> torch.nn.Module:
    """A static source of Ensemble Adversarial Training, trained without a defence."""
    with seeded(0, "source", name):
        model = gb.models.create(name, data)
    gb.train(model, data, create("standard"), recipe=RECIPE, seed=1)
    return model


def cell(data: gb.data.Dataset, defense: Defense, seed: int) -> dict[str, object]:
    """Train one model and judge it."""
    with seeded(seed, "model"):
        model = gb.models.create("lenet5", data, members=defense.num_members)
    gb.train(model, data, defense.with_source_models(lambda name: source(data, name)), recipe=RECIPE, seed=seed)
    found: dict[str, object] = {"clean": gb.evaluation.accuracy(model, data).plain()}
    for eps in RADII:
        uap = StochasticPGD(eps=eps, steps=400, batch_size=64, restarts=2).craft(model, data, seed=seed)
        found[f"uer {eps}"] = gb.evaluation.universal_evasion(model, data, uap).plain()
    few = data.test.subset(torch.arange(1_000))
    with Victim(model, fast=True) as victim:
        found["pgd-40 at 0.1"] = accuracy_under(victim, few, PGD(eps=0.1, steps=40), seed).plain()
        fewest = data.test.subset(torch.arange(SUITE))
        samples = EOT_SAMPLES if victim.inspect(fewest.take(slice(8), victim.device)[0]).stochastic else None
        attacks = standard_suite(eps=0.1, eot_samples=samples)
        found["suite at 0.1"] = run_suite(victim, fewest, attacks, seed=seed).result.robust.plain()
    return found


def main() -> None:
    """Run what is missing, store each cell as it finishes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--out", type=Path, default=Path("results/defenses.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load()
    content = read_json(arguments.out) if arguments.out.is_file() else {"cells": {}}
    settings: dict[str, Any] = {"eps": EPS, "suite": SUITE, "recipe": RECIPE.plain(), "data": data.train.fingerprint}
    settings["rows"] = {name: defense.plain() for name, defense in ROWS.items()}
    old = content.get("settings", {})
    kept = {
        name: cells
        for name, cells in content["cells"].items()
        if {**old, "rows": old.get("rows", {}).get(name)} == {**settings, "rows": settings["rows"].get(name)}
    }
    content = {"settings": settings, "cells": kept, "cost": content.get("cost", {})}
    for seed in range(arguments.seeds):
        for name in arguments.rows:
            if str(seed) in kept.get(name, {}):
                continue
            began = time.process_time()
            found = cell(data, ROWS[name], seed)
            found |= {"cpu seconds": time.process_time() - began, "environment": environment()}
            kept.setdefault(name, {})[str(seed)] = found
            write_json(arguments.out, content)
            print(f"{name}, seed {seed}: {line([found])}", flush=True)
    if set(content["cost"]) != set(kept):
        content["cost"] = {name: plan_of(data, ROWS[name]) for name in kept}
        write_json(arguments.out, content)
    print(f"{'':34} time of a step  clean  {'  '.join(f'UER {eps}' for eps in RADII)}  PGD-40 at 0.1  suite at 0.1")
    for name, cells in kept.items():
        print(f"{name:34} {content['cost'][name]:5.2f}  {line(list(cells.values()))}")


def plan_of(data: gb.data.Dataset, defense: Defense) -> float:
    """Return the time of a step over that of a step of standard training, as ``gambeson train --plan`` measures it."""
    model = gb.models.create("lenet5", data, members=defense.num_members)
    return plan(model, data, defense.with_source_models(lambda name: source(data, name)), RECIPE).plain_ratio


def line(cells: list[dict[str, object]]) -> str:
    """Means over the seeds, and the range of the UERs."""
    columns = ["clean", *(f"uer {eps}" for eps in RADII), "pgd-40 at 0.1", "suite at 0.1"]
    values = {name: [cell[name]["value"] for cell in cells] for name in columns}  # type: ignore[index]
    return "  ".join(f"{statistics.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})" for found in values.values())


if __name__ == "__main__":
    main()
