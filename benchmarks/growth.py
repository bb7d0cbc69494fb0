"""How the cost of attacks grows with images and with steps: counted exactly, and timed with a straight line through it.

``OMP_NUM_THREADS=1 python benchmarks/growth.py [--rounds 7]``

Each attack runs at three numbers of images and three of steps on an untrained LeNet5, so that nothing stops early.
Times are processor seconds, the three sizes taken alternately, and the line goes through the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.attacks import PGD, AutoPGD, Square
from gambeson.base import environment, write_json
from gambeson.victim import Victim

IMAGES, STEPS = (64, 128, 256), (10, 20, 40)
FAMILIES: dict[str, Callable[[int], Any]] = {
    "pgd": lambda steps: PGD(eps=0.03, steps=steps, early_stop=False),
    "auto-pgd": lambda steps: AutoPGD(eps=0.03, steps=steps, early_stop=False),
    # A target that no image is told from the start: the budget is spent on all of them.
    "square": lambda steps: Square(eps=0.001, queries=steps, targeted=True),
}


def measured(model: torch.nn.Module, attack: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int, float]:
    """Return forwards, backwards and processor seconds of one run."""
    with Victim(model) as victim:
        began = time.process_time()
        attack(victim, x, y)
        return victim.forwards, victim.backwards, time.process_time() - began


def line(sizes: tuple[int, ...], seconds: list[float]) -> dict[str, float]:
    """Return the least-squares line through the medians, and the share of their variance that it explains."""
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return {"slope": slope, "intercept": intercept, "r_squared": statistics.correlation(sizes, seconds) ** 2}


def growth(model: torch.nn.Module, runs: list[tuple[Any, torch.Tensor, torch.Tensor]], rounds: int) -> Any:
    """Return the counts and the median seconds of each run."""
    found = [[measured(model, *run) for run in runs] for _ in range(rounds + 1)][1:]
    counts = [list(each[:2]) for each in found[0]]
    return counts, [statistics.median(each[k][2] for each in found) for k in range(len(runs))]


def main() -> None:
    """Measure every family along both axes, store what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/growth.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = gb.models.create("lenet5", in_channels=1, classes=10, image_size=28).eval()
    x = torch.rand(max(IMAGES), 1, 28, 28)
    with torch.no_grad():
        y = model(x).argmin(1)
    content: dict[str, Any] = {"rounds": arguments.rounds, "environment": environment()}
    for name, family in FAMILIES.items():
        axes = {
            "images": (IMAGES, [(family(STEPS[1]), x[:count], y[:count]) for count in IMAGES]),
            "steps": (STEPS, [(family(steps), x[: IMAGES[1]], y[: IMAGES[1]]) for steps in STEPS]),
        }
        for axis, (sizes, runs) in axes.items():
            counts, seconds = growth(model, runs, arguments.rounds)
            found = {"sizes": sizes, "forwards_backwards": counts, "seconds": seconds} | line(sizes, seconds)
            content.setdefault(name, {})[axis] = found
            write_json(arguments.out, content)
            print(name, axis, counts, f"R^2 = {found['r_squared']:.5f}", flush=True)


if __name__ == "__main__":
    main()
