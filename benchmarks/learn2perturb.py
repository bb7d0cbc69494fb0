"""What Learn2Perturb's noise costs beside the plain network: ``python benchmarks/learn2perturb.py``.

Forward and backward of a residual network on one batch, in training mode, three ways in turn: without noise modules,
with them switched off, and with them drawing and learning. A ratio is the median over rounds of neighbours in time, so
that another load on the machine hits both; the ratio of CPU times stands beside it, for it hardly feels such a load.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson.base import environment, generator, seeded, write_json
from gambeson.models import injections
from gambeson.models.noise import FeatureNoise, standard_normal


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/bench-learn2perturb.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.rand(arguments.batch_size, 3, 32, 32, generator=generator(0, "images"))
    labels = torch.arange(arguments.batch_size) % 10

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        return once

    ways: dict[str, torch.nn.Module] = {}
    for name in ("plain", "off", "noise", "noise shared by the batch"):
        sharing = "batch" if "batch" in name else "sample"
        noise = None if name == "plain" else FeatureNoise(sharing=sharing)
        with seeded(0, "model"):
            ways[name] = gb.models.create(arguments.model, in_channels=3, classes=10, image_size=32, noise=noise)
    for module in injections(ways["off"]):
        module.enabled = False
    neurons = sum(size.numel() for module in injections(ways["noise"]) for size in module.learnt)
    flat = torch.empty(arguments.batch_size, neurons)
    works: dict[str, Callable[[], object]] = {name: step(model) for name, model in ways.items()}
    works |= {"draw alone": lambda: standard_normal(flat), "draw alone, torch.randn": lambda: torch.randn_like(flat)}
    for work in works.values():
        work()
    rounds = [{name: timed(work) for name, work in works.items()} for _ in range(arguments.rounds)]
    rows = {}
    for name in works:
        wall, cpu = ([took[name][k] for took in rounds] for k in (0, 1))
        ratios = [[took[name][k] / took["plain"][k] for took in rounds] for k in (0, 1)]
        rows[name] = {
            "milliseconds": 1e3 * median(wall),
            "least_milliseconds": 1e3 * min(wall),
            "cpu_milliseconds": 1e3 * median(cpu),
            "ratio": median(ratios[0]),
            "ratio_of_least": min(wall) / min(took["plain"][0] for took in rounds),
            "cpu_ratio": median(ratios[1]),
        }
        print(name.ljust(26), "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()), flush=True)
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
    load = os.getloadavg()[0]
    about = {"settings": settings, "neurons": neurons, "load_average": load, "environment": environment()}
    write_json(arguments.out, {"rows": rows, "most_allowed": 1.15, **about})


if __name__ == "__main__":
    main()
