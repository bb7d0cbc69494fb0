"""How long the quick audit of a residual network of CIFAR size takes: ``python benchmarks/quick.py``.

ResNet-20 is trained on 12,000 images of CIFAR-10 for five epochs (minutes, kept under ``runs/quick``), then audited by
``gambeson audit --suite quick`` in a process of its own, its start included. Asked for: five minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import gambeson as gb
from gambeson.auditing import AuditResult
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.data import Dataset

RUN, OUT = Path("runs/quick"), Path("results/bench-quick.json")


def main() -> None:
    """Train what is missing, audit afresh, store."""
    data = gb.data.load("cifar10")
    few = data.train.subset(torch.arange(12_000)), data.validation.subset(torch.arange(1_000)), data.test
    with seeded(0, "model"):
        model = gb.models.create("resnet20", data)
    recipe = gb.training.Recipe(epochs=5, batch_size=128, lr=0.1, augment="crop-flip", channels_last=True)
    gb.train(model, Dataset(data.name, *few, data.classes), gb.defenses.Standard(), recipe=recipe, out=RUN / "net")
    audit = RUN / "audit"
    shutil.rmtree(audit, ignore_errors=True)
    command = [sys.executable, "-m", "gambeson", "audit", RUN / "net" / "model.safetensors", "--data", "cifar10"]
    command += ["--suite", "quick", "--out", audit]
    load, began = os.getloadavg()[0], time.perf_counter()
    subprocess.run([str(part) for part in command], check=True)
    seconds = time.perf_counter() - began
    result = AuditResult.load(audit)
    write_json(
        OUT,
        {
            "seconds": seconds,
            "asked": 300,
            "stages": read_json(audit / "timing.json"),
            "cost": result.cost.plain(),
            "clean": result.clean.plain(),
            "trusted": result.verdict.trusted,
            "load_at_start": load,
            "environment": environment(),
        },
    )
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
