"""Train on a folder of JPEGs that stays on disk, and log who decodes what: for one process, several, or one that dies.

As a script: `streams.py FOLDER LOG OUT [cut]`; "cut" kills the process in the middle of the second epoch.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gambeson as gb
from gambeson.base import place
from gambeson.data import lazy
from gambeson.data.folder import Files
from gambeson.training.batches import Epoch

TRAIN, EPOCHS, BATCH = 128, 3, 32
SETTINGS = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.05, "seed": 3}
phase = "other"


def pictures(root: Path) -> Path:
    """Real JPEGs of two classes, bright above or bright below."""
    draw = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", 32), ("test", 32)):
        for number in range(count):
            pixels = draw.integers(0, 120, (40, 48, 3))
            pixels[slice(0, 20) if number % 2 else slice(20, 40)] += 90
            file = root / part / ("down", "up")[number % 2] / f"{number:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def load(root: Path, workers: int | None = None):
    lazy.MEMORY_LIMIT, kept = 0, lazy.MEMORY_LIMIT
    try:
        return gb.data.load(f"image-folder:{root}?size=12", workers=workers)
    finally:
        lazy.MEMORY_LIMIT = kept


def watch(log: Path, die_at: tuple[int, int] | None = None, slow: float = 0.0):
    """Log the phase, the process and the file of every decode; return what takes the watch off."""
    call, walk = Files.__call__, Epoch.walk

    def logged(self, number):
        with log.open("a") as file:  # one short write that appends: whole, whoever else writes
            file.write(f"{phase} {os.getpid()} {os.path.basename(os.fsdecode(bytes(self.paths[number])))}\n")
        time.sleep(slow)
        return call(self, number)

    def marked(self, first=0):
        global phase
        phase = str(self.epoch)  # workers are forked later, and know it
        for k, batch in enumerate(walk(self, first)):
            if (self.epoch, k) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
        phase = "other"

    Files.__call__, Epoch.walk = logged, marked  # type: ignore[method-assign]

    def off():
        Files.__call__, Epoch.walk = call, walk

    return off


def decodes(log: Path) -> dict[str, list[tuple[int, str]]]:
    """Return by phase the processes and the files."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in log.read_text().splitlines():
        when, process, file = line.split()
        found.setdefault(when, []).append((int(process), file))
    return found


def run(data, out: Path | None, **settings):
    torch.manual_seed(0)
    model = gb.models.create("lenet5", data)
    history = gb.train(model, data, gb.defenses.Standard(), out=out, **{**SETTINGS, **settings})
    return model, history


def main(folder: str, log: str, out: str, how: str = "whole") -> None:
    torch.set_num_threads(1)
    if how == "command":
        lazy.MEMORY_LIMIT = 0
        watch(Path(log), slow=0.05)
        arguments = ["--data", f"image-folder:{folder}?size=12", "--model", "lenet5", "--defense", "standard"]
        gb.cli.main(["train", *arguments, "--epochs", "50", "--batch-size", "32", "--out", out, "--json"])
    watch(Path(log), (1, 1) if how == "cut" else None)
    model, _ = run(load(Path(folder)), Path(out))
    if place()[0] == 0:
        gb.models.save(model, Path(out) / "model.safetensors")


if __name__ == "__main__":
    import gambeson.cli

    main(*sys.argv[1:])
