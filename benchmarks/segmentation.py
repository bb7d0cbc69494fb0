"""Shared adversarial training on label maps against universal attacks: ``python benchmarks/segmentation.py``.

``fashion-scenes`` at 64 pixels, a small U-Net without a defence and with shared adversarial training at 8/255 for heaps
of 1, 4 and 8 whole images, which goes on from the net without a defence of the same seed. Of each net: clean pixel
accuracy and mean IoU; the success of static targets (the true maps of three validation scenes that items cover in large
part) and of hiding a class, and the untargeted UER, at five eps with their controls; and the smallest eps with the same
success, over that of the net without a defence. Crafted on train, chosen on validation, reported on test. A cell, one
net of one seed, is stored when it is done and not run again; its net and its perturbations stay in ``--folder``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.attacks import CONTROLS, StochasticPGD, UniversalPerturbation
from gambeson.base import environment, load_tensors, pick_device, read_json, save_tensors, write_json
from gambeson.data import Dataset, Split
from gambeson.defenses import Defense, create
from gambeson.evaluation import confusion, control_rates, fooling_rate, mean_iou, target_success, universal_evasion
from gambeson.training import Recipe
from gambeson.victim import Victim

NAME, MODEL, EPS = "fashion-scenes", "unet-small", 8 / 255
ROWS: dict[str, Defense] = {
    "standard": create("standard"),
    **{f"shared s {s}": create("shared-adversarial", eps=EPS, sharedness=s) for s in (1, 4, 8)},
    "shared s 4 targeted": create("shared-adversarial", eps=EPS, sharedness=4, target="truth"),
}
MORE = ("shared s 4 targeted",)
"""Rows that are run where they are named only."""
RADII = tuple(k / 255 for k in (4, 8, 16, 32, 64))
TARGETS, COVER, HIDDEN = 3, 0.4, ("Trouser", "Bag")
"""Static targets, and the share of their labelled pixels that items cover at least; classes to hide."""
LEVELS = (0.6, 0.75, 0.9)
"""Success whose smallest eps is compared."""
ATTACK: dict[str, Any] = {"steps": 150, "batch_size": 32, "probe_starts": 0}
"""The papers' one run from zero."""


def recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """Return the recipe of the net without a defence, and that of the nets that go on from it."""
    fast = {"precision": arguments.precision, "channels_last": True, "batch_size": arguments.batch_size}
    first = Recipe(preset="segmentation", epochs=arguments.epochs, **fast)
    further = {"epochs": arguments.further, "lr": 0.5 * first.lr, "warmup": 0.5}
    return {"standard": first, "shared": Recipe(preset="segmentation", **further, **fast)}


def load(scenes: int, folder: Path) -> Dataset:
    """Compose the scenes once, for all processes of this study."""
    file = folder / f"scenes-{scenes}.safetensors"
    if not file.is_file():
        data = gb.data.load(f"{NAME}?train={scenes}")
        maps = {part: getattr(data, part) for part in ("train", "validation", "test")}
        tensors = {f"{part} images": split.images for part, split in maps.items()}
        tensors |= {f"{part} labels": split.labels.to(torch.uint8) for part, split in maps.items()}
        save_tensors(file, tensors, {"classes": list(data.classes), "ignored": data.train.task.ignore_index})
    tensors, about = load_tensors(file)
    classes = tuple(about["classes"])
    splits = [
        Split(f"{NAME}/{part}", tensors[f"{part} images"], tensors[f"{part} labels"], classes, about["ignored"])
        for part in ("train", "validation", "test")
    ]
    return Dataset(NAME, *splits, classes)


def file_of(row: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the file of a cell's net."""
    folder = arguments.folder / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{row.replace(' ', '-')}-{seed}.safetensors"


def network(row: str, seed: int, data: Dataset, arguments: argparse.Namespace) -> torch.nn.Module:
    """Return the trained net of a cell, from its file if it has been trained."""
    file = file_of(row, seed, arguments)
    if file.is_file():
        return gb.models.load(file).to(arguments.device)
    model = gb.models.create(MODEL, data, seed=seed).to(arguments.device)
    if row != "standard":
        model.load_state_dict(network("standard", seed, data, arguments).state_dict())
    recipe = recipes(arguments)["standard" if row == "standard" else "shared"]
    began = time.perf_counter()
    gb.train(model, data, ROWS[row], recipe=recipe, seed=seed, out=arguments.folder / "runs" / file.stem)
    gb.models.save(model, file, {"seconds": time.perf_counter() - began, "recipe": recipe.plain()})
    return model


def targets_of(data: Dataset) -> list[str]:
    """Return the first validation scenes of whose labelled pixels items cover enough, and the classes to hide."""
    valid = data.validation.task.valid(data.validation.labels)
    cover = ((data.validation.labels > 0) & valid).flatten(1).sum(1) / valid.flatten(1).sum(1)
    chosen = (cover >= COVER).nonzero().flatten()[:TARGETS].tolist()
    return [*(f"static:{index}" for index in chosen), *(f"hide:{name}" for name in HIDDEN)]


def measure(row: str, seed: int, data: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one net and attack it."""
    model = network(row, seed, data, arguments)
    stored = load_tensors(file_of(row, seed, arguments))[1]["about"]
    clean = confusion(model, data)
    found: dict[str, Any] = {"training seconds": stored["seconds"], "clean": clean.accuracy.plain()}
    found |= {"mean iou": clean.mean_iou.plain(), "iou": {name: rate.plain() for name, rate in clean.iou.items()}}
    uaps = arguments.folder / "uaps" / file_of(row, seed, arguments).stem
    uaps.mkdir(parents=True, exist_ok=True)
    for target in ["untargeted", *targets_of(data)]:
        aim = {} if target == "untargeted" else {"target": target}
        if target.startswith("static"):
            aim |= {"labels": "truth"}  # one target for all nets
        for eps in RADII:
            file = uaps / f"{target.replace(':', '-')}-{round(eps * 255)}.safetensors"
            if not file.is_file():
                StochasticPGD(eps=eps, **ATTACK, **aim).craft(model, data, seed=seed).save(file)
            uap = UniversalPerturbation.load(file)
            found.setdefault(target, {})[f"{round(eps * 255)}"] = judged(model, data, uap, target)
    return found


def judged(model: torch.nn.Module, data: Dataset, uap: UniversalPerturbation, target: str) -> dict[str, Any]:
    """Return what a perturbation does to the test scenes, with its controls."""
    if target != "untargeted":
        return target_success(model, data, uap, controls=CONTROLS).plain()
    with Victim(model, fast=True) as victim:
        controls = [one.plain() for one in control_rates(victim, data.test, uap.ball, seed=0)]
    rates = {"uer": universal_evasion(model, data, uap), "fooling": fooling_rate(model, data, uap)}
    rates["mean iou"] = mean_iou(model, data, uap)
    return {name: rate.plain() for name, rate in rates.items()} | {"controls": controls}


def reached(cell: dict[str, Any], target: str, level: float) -> float | None:
    """Return the smallest eps (of 255) with this success, log-linear between the eps tried; None beyond them.

    What a smaller eps reaches, a larger one does. For a class to hide, success is the share that is hidden. Where the
    smallest eps succeeds already, it is returned: an upper bound.
    """
    before: tuple[float, float] | None = None
    for eps, one in cell[target].items():
        kind = "uer" if target == "untargeted" else "hidden" if target.startswith("hide") else "success"
        value = one[kind]["value"] if before is None else max(before[1], one[kind]["value"])
        if value >= level:
            if before is None:
                return float(eps)
            share = (level - before[1]) / (value - before[1])
            return before[0] * (float(eps) / before[0]) ** share
        before = float(eps), value
    return None


def ratios(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the smallest eps with that of the net without a defence, per row, kind of target and level.

    Targets and seeds for which the hardened net withstands every eps tried count as that of the largest, and are
    counted as censored: the ratio is then a lower bound.
    """
    found: dict[str, Any] = {}
    for row in (row for row in cells if row != "standard"):
        for kind in ("untargeted", "static", "hide"):
            for level in LEVELS:
                values, censored = [], 0
                for seed, cell in cells[row].items():
                    plain = cells.get("standard", {}).get(seed)
                    for target in (name for name in cell if name.startswith(kind)):
                        base = None if plain is None else reached(plain, target, level)
                        if base is None:
                            continue
                        ours = reached(cell, target, level)
                        censored += ours is None
                        values.append((RADII[-1] * 255 if ours is None else ours) / base)
                if values:
                    mean = math.exp(statistics.mean(math.log(value) for value in values))
                    about = {"ratio": mean, "low": min(values), "high": max(values), "n": len(values)}
                    found.setdefault(row, {}).setdefault(kind, {})[str(level)] = about | {"censored": censored}
    return found


def show(content: dict[str, Any]) -> None:
    """Print one line per row."""
    for row, cells in content["cells"].items():
        means = {key: statistics.mean(cell[key]["value"] for cell in cells.values()) for key in ("clean", "mean iou")}
        line = [f"{name} {value:.3f}" for name, value in means.items()]
        for kind, key in (("untargeted", "uer"), ("static", "success"), ("hide", "hidden")):
            for eps in ("4", "8", "16", "32"):
                each = [c[t][eps][key]["value"] for c in cells.values() for t in c if t.startswith(kind)]
                line.append(f"{kind} {eps}: {statistics.mean(each):.2f}")
        print(f"{row:20} {'  '.join(line)}")
    for row, kinds in content["ratios"].items():
        for kind, levels in kinds.items():
            print(f"{row:20} {kind:10} " + "  ".join(f"{level}: {one['ratio']:.2f}x" for level, one in levels.items()))


def main() -> None:
    """Run what is missing, store each cell as it finishes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=[row for row in ROWS if row not in MORE], choices=ROWS)
    parser.add_argument("--out", type=Path, default=Path("results/segmentation.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/segmentation"), help="of nets and perturbations")
    parser.add_argument("--scenes", type=int, default=16_000, help="in train")
    parser.add_argument("--epochs", type=int, default=30, help="without a defence")
    parser.add_argument("--further", type=int, default=8, help="epochs of the other rows, which go on from there")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "SEED"), help="of one process")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.jobs))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = load(arguments.scenes, arguments.folder)
    if arguments.cell:
        row, seed = arguments.cell[0], int(arguments.cell[1])
        cell = measure(row, seed, data, arguments) | {"environment": environment(arguments.device)}
        write_json(arguments.folder / "cells" / f"{row}-{seed}.json", cell)
        return
    plain = {name: recipe.plain() for name, recipe in recipes(arguments).items()}
    settings = {"attack": ATTACK, "recipes": plain, "data": data.train.fingerprint, "targets": targets_of(data)}
    content = read_json(arguments.out) if arguments.out.is_file() else {}
    cells = content.get("cells", {}) if content.get("settings") == settings else {}

    def run(row: str, seed: int) -> None:
        own = ["--folder", arguments.folder, "--scenes", arguments.scenes, "--epochs", arguments.epochs]
        own += ["--further", arguments.further, "--batch-size", arguments.batch_size, "--device", arguments.device]
        own += ["--jobs", arguments.jobs]
        command = [sys.executable, __file__, *own, "--precision", arguments.precision, "--cell", row, seed]
        subprocess.run([str(part) for part in command], check=True)
        cells.setdefault(row, {})[str(seed)] = read_json(arguments.folder / "cells" / f"{row}-{seed}.json")
        whole = {"settings": settings, "cells": {name: cells[name] for name in ROWS if name in cells}}
        write_json(arguments.out, whole | {"ratios": ratios(cells)})
        print(f"{row}, seed {seed}: mean IoU {cells[row][str(seed)]['mean iou']['value']:.3f}", flush=True)

    seeds = range(arguments.seeds)
    missing = [(row, seed) for seed in seeds for row in arguments.rows if str(seed) not in cells.get(row, {})]
    for first in (True, False):  # the other rows go on from the nets of the first
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda one: run(*one), [one for one in missing if (one[0] == "standard") == first]))
    show(read_json(arguments.out))


if __name__ == "__main__":
    main()
