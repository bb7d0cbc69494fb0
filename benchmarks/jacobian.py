"""Jacobian regularisation's estimators: what a step costs, and whether the cheap ones lead to the same net.

``python benchmarks/jacobian.py [cost] [equal]``; Fashion-MNIST. Costs are medians of interleaved steps over plain
steps of the same process. For equality LeNet-5 is trained on the first images with three seeds an estimator; the
UER is that of stochastic PGD, on test images.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.base import derive, environment, seeded, write_json
from gambeson.data import Dataset, Split
from gambeson.defenses import Batch, Defense, Standard, TrainContext
from gambeson.defenses.jacobian import Jacobian, JacobianNorm
from gambeson.defenses.trades import Trades

OUT = Path("results/bench-jacobian.json")
STEPS, WARM, BATCH = 25, 4, 128
SEEDS, IMAGES, EPOCHS, STRENGTH, EPS = (0, 1, 2), 4000, 8, 0.01, 0.1

CHEAP = {"estimator": "input", "share": 1 / 8}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "projection": {},
    "exact": {"estimator": "exact"},
    "input, whole batch": {"estimator": "input"},
    "input, a quarter": {"estimator": "input", "share": 1 / 4},
    "input, an eighth": CHEAP,
    "input, an eighth, every 2": {**CHEAP, "every": 2},
    "input, a quarter, every 4": {"estimator": "input", "share": 1 / 4, "every": 4},
    "input, an eighth, difference": {**CHEAP, "derivative": "finite-difference"},
    "stacked, an eighth": {**CHEAP, "estimator": "stacked"},
    "stacked, an eighth, power": {**CHEAP, "estimator": "stacked", "power": True},
}
COMPARED = (
    "projection",
    "input, an eighth",
    "input, an eighth, every 2",
    "input, an eighth, difference",
    "stacked, an eighth",
)


def costs(data: Dataset, name: str) -> dict[str, Any]:
    """Time one step of each defence in turn, many times over."""
    ways: dict[str, Defense] = {"plain": Standard()}
    ways |= {key: Jacobian(**settings) for key, settings in ESTIMATORS.items()}
    ways["trades, 10 steps"] = Trades(eps=EPS)
    runs = {key: _Stepper(data, name, defense) for key, defense in ways.items()}
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for step in range(WARM + STEPS):
        for key, run in runs.items():
            if key in ("exact", "trades, 10 steps") and step >= WARM + 5:
                continue
            seconds[key].append(run(step))
    every = {key: _mean_step(values[WARM:], key) for key, values in seconds.items()}
    rows = {key: {"seconds": value, "ratio": value / every["plain"]} for key, value in every.items()}
    for key, row in rows.items():
        print(f"{name:8} {key:32} {row['ratio']:.3f} of a plain step", flush=True)
    return {"model": name, "batch": BATCH, "steps": STEPS, "rows": rows}


def _mean_step(values: list[float], key: str) -> float:
    every = int(key[-1]) if key[:-1].endswith("every ") else 1
    kinds = [[values[k] for k in range(len(values)) if (k + WARM) % every == kind] for kind in range(every)]
    return statistics.mean(statistics.median(kind) for kind in kinds)


class _Stepper:
    def __init__(self, data: Dataset, name: str, defense: Defense) -> None:
        with seeded(0, "model"):
            self.model = gb.models.create(name, data).train()
        self.images, self.labels = data.train.take(torch.arange(BATCH))
        self.objective = defense.build_objective(
            TrainContext(model=self.model, train=data.train, seed=0, epochs=1, steps=1, batch_size=BATCH)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self, step: int) -> float:
        began = time.perf_counter()
        batch = Batch(images=self.images, labels=self.labels, seed=derive(0, "step", step), step=step)
        for losses, _ in self.objective.optimizer_steps(self.model, batch):
            self.optimizer.zero_grad()
            losses["loss"].backward()
            self.optimizer.step()
        self.objective.after_step(batch)
        return time.perf_counter() - began


def equality(data: Dataset) -> list[dict[str, Any]]:
    """Train with each estimator and seed; measure the exact norm, the clean error and the UER on test images."""
    rows = []
    for key in ("plain", *COMPARED):
        for seed in SEEDS:
            defense = Standard() if key == "plain" else Jacobian(strength=STRENGTH, **ESTIMATORS[key])
            with seeded(seed, "model"):
                model = gb.models.create("lenet5", data)
            gb.train(model, data, defense, epochs=EPOCHS, lr=0.05, seed=seed)
            attack = gb.attacks.StochasticPGD(eps=EPS, steps=60, restarts=1)
            uap = attack.craft(model, data, seed=seed)
            row: dict[str, Any] = {
                "estimator": key,
                "seed": seed,
                "norm": mean_norm(model, data.test),
                "clean_error": 1 - gb.evaluation.accuracy(model, data).value,
                "uer": gb.evaluation.universal_evasion(model, data, uap).value,
            }
            print(
                {name: value if isinstance(value, str) else round(value, 4) for name, value in row.items()}, flush=True
            )
            rows.append(row)
    return rows


def mean_norm(model: torch.nn.Module, split: Split) -> float:
    """Root of the mean squared Frobenius norm over a thousand images, in evaluation mode."""
    model.eval()
    images, labels = split.take(torch.arange(min(1000, len(split))))
    total = 0.0
    for part in torch.arange(len(images)).split(250):
        batch = Batch(images=images[part], labels=labels[part], seed=0)
        total += 2 * float(JacobianNorm(estimator="exact")(model, batch).detach()) * len(part)
    return math.sqrt(total / len(images))


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare each estimator's means with those of the paper's, in units of that one's spread over seeds."""
    found: dict[str, Any] = {}
    for key in COMPARED:
        found[key] = {}
        for measure in ("norm", "clean_error", "uer"):
            ours = [row[measure] for row in rows if row["estimator"] == key]
            paper = [row[measure] for row in rows if row["estimator"] == COMPARED[0]]
            found[key][measure] = {
                "mean": statistics.mean(ours),
                "sd": statistics.stdev(ours),
                "away_in_sd_of_projection": (statistics.mean(ours) - statistics.mean(paper)) / statistics.stdev(paper),
                "inside_range_of_projection": min(paper) <= statistics.mean(ours) <= max(paper),
            }
    return found


def main() -> None:
    """Do what is asked for, both by default, and store it beside what is stored already."""
    torch.set_num_threads(1)
    asked = sys.argv[1:] or ["cost", "equal"]
    full = gb.data.load("fashion-mnist")
    content: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    if "cost" in asked:
        content["cost"] = [costs(full, name) for name in ("lenet5", "lenet")]
    if "equal" in asked:
        images, labels = full.train.take(torch.arange(IMAGES + 1000))
        held, held_labels = full.test.take(torch.arange(2000))
        data = Dataset(
            name="fashion-mnist",
            classes=full.classes,
            train=Split("train", images[:IMAGES], labels[:IMAGES], full.classes),
            validation=Split("validation", images[IMAGES:], labels[IMAGES:], full.classes),
            test=Split("test", held, held_labels, full.classes),
        )
        rows = equality(data)
        about = {"images": IMAGES, "epochs": EPOCHS, "strength": STRENGTH, "eps": EPS, "model": "lenet5"}
        content["equal"] = {**about, "rows": rows, "verdicts": verdicts(rows)}
    content["environment"] = environment()
    write_json(OUT, content)


if __name__ == "__main__":
    main()
