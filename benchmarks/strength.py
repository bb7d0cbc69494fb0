"""The accuracy under attacks on single images that the audit reports, against what stronger attacks leave of it.

``python benchmarks/strength.py`` attacks honest networks of the testbed, robust ones among them, at the radius of the
audit's suites: by the per-image stage of the suites ``quick`` and ``standard``, as an audit runs it; by AutoAttack's
standard version (pyautoattack, of the extra ``bench``); and, where that left an image right, by an exhaustive run of
our own: PGD on the margin with restarts, targeted Auto-PGD on the margin towards all wrong classes in full, and Square.
What survives both is the reference. All attack the same images, each network and attacker is stored when it is done,
and the same command goes on from there. Costs are counted: images sent forward, and images whose gradient was taken.
``python benchmarks/audit_page.py`` puts the table into ``docs/audit.md``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import PGD, Square, TargetedAutoPGD
from gambeson.auditing import SUITES
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.data import Dataset
from gambeson.evaluation import run_suite
from gambeson.testbed.library import entry_of
from gambeson.testbed.recipes import DATA, networks
from gambeson.victim import Victim

RESULTS = Path(__file__).parent.parent / "results" / "strength.json"
NETS = (
    *(
        ("digits", name)
        for name in (
            "standard",
            "pgd-adversarial",
            "pgd-adversarial 1",
            "trades",
            "shared-adversarial",
            "jacobian",
            "ensemble of 3",
            "smooth kernels",
        )
    ),
    ("mnist5k", "standard"),
    ("mnist5k", "pgd-adversarial"),
)
IMAGES = 500
LIMITS = {"quick": 0.015, "standard": 0.005}
"""By how much a suite's accuracy may lie above the reference, as a share."""
ALONE: dict[str, Any] = {
    **{"universal_steps": 1, "universal_restarts": 1, "universal_probe_starts": 0, "eps_uni_runs": 0, "eps_adv": False},
    **{"targeted": False, "surrogate": "none", "noise_sizes": (), "edits": (), "jacobian_backwards": 0, "queries": 0},
    **{"checks": (), "test_images": None, "validation_images": 50, "controls": ()},
}
"""What an audit leaves out so that little more than its per-image stage is left."""

Found = dict[str, Any]
"""Which images are right, and the images forward and the gradients that it took."""


def by_suite(suite: str, model: nn.Module, data: Dataset, eps: float) -> Found:
    """Run the per-image stage of a suite; an image is right if it is under every attack that was tried on it."""
    audit = gb.audit(model, data, SUITES[suite].model_copy(update={**ALONE, "eps": (eps,)}))
    right, parts = torch.ones(len(data.test), dtype=torch.bool), audit.results.per_image
    for part in parts:
        rows, counts = audit.outcomes.of(f"per_image:{part.attack}") or (torch.arange(0), None)
        if counts is not None:
            right[rows] &= counts.right > 0
    reported = min(part.accuracy.value for part in parts)
    cost = sum((part.cost for part in parts[1:]), parts[0].cost)
    attacks = {part.attack: part.accuracy.value for part in parts}
    return {"right": right, "reported": reported, "attacks": attacks, **cost.plain()}


class Counted(nn.Module):
    """A model that counts the images sent forward, and those whose gradient is taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: torch.Tensor) -> None:
        self.backwards += len(gradient)


def by_autoattack(model: nn.Module, data: Dataset, eps: float) -> Found:
    """Run AutoAttack's standard version."""
    from pyautoattack import AutoAttack

    counted = Counted(model)
    x, y = data.test.take(slice(None), torch.device("cpu"))
    suite = AutoAttack(counted, norm="Linf", eps=eps, version="standard", device="cpu", seed=0)
    suite.logger.setLevel(logging.CRITICAL)
    moved = suite.run_standard_evaluation(x, y, batch_size=250)[0]
    with torch.no_grad():
        right = model(moved).argmax(1) == y
    return {"right": right, "forwards": counted.forwards, "backwards": counted.backwards}


def exhaustively(model: nn.Module, data: Dataset, eps: float) -> Found:
    """Run stronger attacks of our own than any suite has."""
    attacks: dict[str, Any] = {
        "pgd on the margin": PGD(eps=eps, steps=100, restarts=3, loss="margin", shrink=0.06),
        "auto-pgd-targeted": TargetedAutoPGD(eps=eps, steps=100, loss="margin"),
        "square": Square(eps=eps, queries=5000),
    }
    with Victim(model, fast=True) as victim:
        run = run_suite(victim, data.test, attacks, seed=1)
        cost = {"forwards": victim.forwards, "backwards": victim.backwards}
    return {"right": run.counts.right > 0, **cost}


ATTACKERS: dict[str, Callable[[nn.Module, Dataset, float], Found]] = {
    "quick": partial(by_suite, "quick"),
    "standard": partial(by_suite, "standard"),
    "autoattack": by_autoattack,
    "exhaustive": exhaustively,
}


def material(name: str, images: int) -> Dataset:
    """Return a data set with a stratified sample of its test images that occur in no other split."""
    data = networks(name).data
    data = gb.data.disjoint(data)
    test = data.test.sample(min(images, len(data.test)), seed=0)
    return Dataset(data.name, data.train, data.validation, test, data.classes)


def work(found: Found) -> int:
    """Return a cost in forwards: a gradient is a forward, counted as such, and a backward, which takes two."""
    return int(found["forwards"] + 2 * found["backwards"])


def row(cell: dict[str, Found]) -> dict[str, Any]:
    """Return what one network's attackers say together."""
    count = len(cell["quick"]["right"])
    standing = cell["exhaustive"]["right"]
    least = sum(standing) / count
    found: dict[str, Any] = {
        "images": count,
        "autoattack": sum(cell["autoattack"]["right"]) / count,
        "reference": least,
    }
    for name in LIMITS:
        found[name] = {
            "reported": cell[name]["reported"],
            "above": cell[name]["reported"] - least,
            "missed": sum(s and not r for s, r in zip(standing, cell[name]["right"], strict=True)),
            "cost": work(cell[name]) / work(cell["autoattack"]),
            "gradients": cell[name]["backwards"] / cell["autoattack"]["backwards"],
        }
    return found


def summary(cells: dict[str, dict[str, Found]]) -> dict[str, Any]:
    """Return a row for each network that all have attacked, and the worst of each suite."""
    rows = {name: row(cell) for name, cell in cells.items() if set(ATTACKERS) <= set(cell)}
    worst = {
        suite: {
            "above": max(found[suite]["above"] for found in rows.values()),
            "within": sum(found[suite]["above"] <= limit + 1e-9 for found in rows.values()),
            "networks": len(rows),
            "cost": max(found[suite]["cost"] for found in rows.values()),
        }
        for suite, limit in LIMITS.items()
        if rows
    }
    return {"rows": rows, "worst": worst}


def main() -> None:
    """Attack what has not been attacked, and store after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--only", nargs="*", help="networks, such as 'digits standard'; all others stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    stored = read_json(arguments.out) if arguments.out.is_file() else {"cells": {}, "images": arguments.images}
    if stored["images"] != arguments.images:
        parser.error(f"{arguments.out} is about {stored['images']} images: choose as many, or another --out")
    torch.set_num_threads(1)
    for data_name, net in NETS:
        name = f"{data_name} {net}"
        cell = stored["cells"].setdefault(name, {})
        if arguments.only and name not in arguments.only:
            continue
        data, eps = material(data_name, arguments.images), DATA[data_name].radius
        for attacker, attack in ATTACKERS.items():
            if attacker in cell:
                continue
            model = entry_of(net, data_name).build(networks(data_name))
            began = time.process_time()
            rows, some = torch.arange(len(data.test)), data
            if attacker == "exhaustive":  # what is broken needs no more
                rows = torch.tensor(cell["autoattack"]["right"]).nonzero().flatten()
                some = Dataset(data.name, data.train, data.validation, data.test.subset(rows), data.classes)
            right = torch.zeros(len(data.test), dtype=torch.long)
            found: Found = {"forwards": 0, "backwards": 0}
            if len(rows):
                with seeded(0, "strength", attacker):
                    found = attack(model, some, eps)
                right[rows] = found["right"].long()
            found["right"] = right.tolist()
            cell[attacker] = {**found, "processor_seconds": round(time.process_time() - began, 1)}
            about = {"eps": {one: DATA[one].radius for one, _ in NETS}, "seed": 0, "environment": environment()}
            settings = {name: SUITES[name].model_copy(update=ALONE).plain() for name in LIMITS}
            stored |= {**about, "images": arguments.images, "suites": settings, "summary": summary(stored["cells"])}
            write_json(arguments.out, stored)
            print(name, attacker, sum(found["right"]), cell[attacker]["processor_seconds"], flush=True)
    for name, found in stored["summary"]["rows"].items():
        print(name, found)


if __name__ == "__main__":
    main()
