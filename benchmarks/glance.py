"""How long a glance takes, on the clock: ``python benchmarks/glance.py``, with nothing else running.

Two networks are audited by ``gambeson audit NET --suite glance --device cpu``, the start of Python and the loading of
images and weights included: a ResNet-20 trained for two epochs on 8,000 images of CIFAR-10, and torchvision's ResNet-50
at 224 pixels on the solar cells of the case studies, with random filters, statistics of its batch norms from the
training images, and a last layer trained here. What the networks were trained to does not change the work of a glance
much; how many images they have right does.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import case_cells
import torch
from stored import RESULTS, Rows
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.base import read_json, save_tensors, seeded
from gambeson.data import load

NAMES = ("ResNet-20, CIFAR-10", "ResNet-50, 224 pixels")
LIMITS = dict(zip(NAMES, (60, 600), strict=True))
"""Seconds that the project allows on two cores."""
FEW, EPOCHS = 8000, 2
"""Training images and epochs of the ResNet-20."""
IMAGES, STEPS = 320, 300
"""Training images behind the last layer of the ResNet-50, and its steps."""


def resnet20(folder: Path) -> tuple[str, str]:
    """Train the smaller network; return its name and that of its data."""
    out = folder / "resnet20"
    if not (out / "model.safetensors").is_file():
        whole = load("cifar10")
        few = gb.data.Dataset(whole.name, whole.train.sample(FEW), whole.validation, whole.test, whole.classes)
        gb.train(
            gb.models.create("resnet20", few),
            few,
            gb.defenses.create("standard"),
            epochs=EPOCHS,
            batch_size=128,
            lr=0.1,
            out=out,
        )
    return str(out), "cifar10"


def resnet50(folder: Path) -> tuple[str, str]:
    """Make the larger network; return its name and that of its data."""
    case_cells.write_cells(folder / "cells")
    name, file = f"image-folder:{folder / 'cells'}?mode=rgb", folder / "resnet50.safetensors"
    if not file.is_file():
        data = load(name)
        model = gb.models.create("torchvision:resnet50", data, seed=0)
        body: Any = model.body
        last = body.fc
        body.fc = nn.Identity()
        some = data.train.sample(IMAGES, seed=0)
        with torch.no_grad():
            body.train()
            for x, _ in some.walk(torch.arange(IMAGES).split(32)):
                body(model.normalize(x))
            body.eval()
            found = [(body(model.normalize(x)), y) for x, y in some.walk(torch.arange(IMAGES).split(32))]
        features, labels = torch.cat([one for one, _ in found]), torch.cat([y for _, y in found])
        mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
        with seeded(0, "head"):
            layer = nn.Linear(features.shape[1], data.num_classes)
        step = torch.optim.Adam(layer.parameters(), 1e-3)
        for _ in range(STEPS):
            step.zero_grad()
            F.cross_entropy(layer((features - mean) / std), labels).backward()
            step.step()
        with torch.no_grad():
            last.weight.copy_(layer.weight / std)
            last.bias.copy_(layer.bias - last.weight @ mean)
        body.fc = last
        save_tensors(file, body.state_dict(), {})
    return f"torchvision:resnet50@{file}?normalise=imagenet", name


NETS = dict(zip(NAMES, (resnet20, resnet50), strict=True))


def table(content: dict[str, Any]) -> str:
    """Return the times as a table, for the page of suites."""
    cores = content["about"]["settings"]["threads"]
    lines = [
        f"| network | on the clock, {cores} cores | of that, processor | forwards | gradients | UER found |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        seconds, counts = (f"{row[key]:.0f} s" for key in ("wall_seconds", "processor_seconds")), row["cost"]
        cells = (name, *seconds, f"{counts['forwards']:,}", f"{counts['backwards']:,}", f"{100 * row['uer']:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Audit what has not been timed, and store each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/glance"), help="of networks, data and audits")
    parser.add_argument("--prepare", action="store_true", help="make the networks, time nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "glance.json")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, "python benchmarks/glance.py", {"limits": LIMITS, "threads": torch.get_num_threads()})
    for name in NETS if arguments.prepare else rows.missing(NETS):
        model, data = NETS[name](arguments.folder)
        if arguments.prepare:
            continue
        out = arguments.folder / f"audit of {name}"
        command = [
            "-m",
            "gambeson",
            "audit",
            model,
            "--data",
            data,
            "--suite",
            "glance",
            "--device",
            "cpu",
            "--out",
            out,
        ]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        result = read_json(out / "result.json")
        row = {
            "wall_seconds": round(wall, 1),
            "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "clean": result["clean"]["value"],
            "uer": result["universal"][0]["uer"]["value"],
            "cost": result["cost"],
            "within": wall <= LIMITS[name],
        }
        rows.add(name, row)
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
