"""What the Jacobian analysis costs: the stacked Jacobian's spectrum, and the pair metrics.

``python benchmarks/analysis.py [images]``: 10,000 images of 3 x 32 x 32 and 10 classes by default. The spectrum's
time stands beside that of as many batched backward passes as exact Jacobians need, in turns on the same batches, so
that the ratio holds on a busy machine as well. Its goal is 3; that of its memory 2 GiB, of 1,000 pairs 20 seconds.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gambeson as gb
from gambeson.analysis import pair_sharing, stacked_spectrum
from gambeson.base import environment, generator, seeded, write_json
from gambeson.data import Split

OUT = Path("results/bench-analysis.json")
CLASSES, SHAPE, BATCH, PAIRS, PARTS = 10, (3, 32, 32), 200, 1000, 5
GOALS = {"ratio": 3.0, "gib": 2.0, "pair_seconds": 20.0}


def backwards(model: nn.Module, split: Split) -> float:
    """Seconds of one forward and ten backwards of every image, in batches, by plain PyTorch."""
    began = time.perf_counter()
    for images, _ in split.batches(BATCH):
        point = images.requires_grad_()
        logits = model(point)
        for k in range(CLASSES):
            torch.autograd.grad(logits[:, k].sum(), point, retain_graph=k + 1 < CLASSES)
    return time.perf_counter() - began


def spectrum(model: nn.Module, split: Split) -> float:
    """Seconds of the stacked Jacobian's top eigenpair."""
    began = time.perf_counter()
    found = stacked_spectrum(model, split)
    if not float(found.values[0]) > 0:
        raise AssertionError("the model has no slope")
    return time.perf_counter() - began


def gib() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(name: str, images: int) -> dict[str, Any]:
    """Time backwards on fifths of the set before and after the spectrum of the whole."""
    with seeded(0, "benchmark", name):
        model = gb.models.create(name, in_channels=SHAPE[0], classes=CLASSES, image_size=SHAPE[1]).eval()
    model.requires_grad_(False)
    draw = generator(0, "benchmark", "images")
    pixels = torch.randint(0, 256, (images, *SHAPE), generator=draw, dtype=torch.uint8)
    split = Split("random", pixels, torch.arange(images) % CLASSES)
    parts = [split.subset(torch.arange(k, images, PARTS)) for k in range(PARTS)]
    backwards(model, parts[0].subset(torch.arange(min(BATCH, len(parts[0])))))  # warm
    before = [backwards(model, part) for part in parts[::2]]
    whole = spectrum(model, split)
    after = [backwards(model, part) for part in parts[1::2]]
    each = statistics.median([*before, *after]) * PARTS
    row = {"model": name, "spectrum_seconds": whole, "backwards_seconds": each, "ratio": whole / each, "gib": gib()}
    print(
        f"{name}: {whole:.1f} s, {row['ratio']:.2f} of {CLASSES} backwards an image; {row['gib']:.2f} GiB", flush=True
    )
    return row


def pairs() -> dict[str, Any]:
    """Time the pair metrics of LeNet on 28 x 28 digits; the weights do not matter for it."""
    with seeded(0, "benchmark", "pairs"):
        model = gb.models.create("lenet", in_channels=1, classes=CLASSES, image_size=28).eval()
    pixels = torch.randint(0, 256, (1000, 1, 28, 28), generator=generator(0, "benchmark", "pairs"), dtype=torch.uint8)
    split = Split("random", pixels, torch.arange(1000) % CLASSES)
    backwards(model, split.subset(torch.arange(BATCH)))  # warm
    each = backwards(model, split) / len(split)
    began = time.perf_counter()
    found = pair_sharing(model, split, pairs=PAIRS)
    seconds = time.perf_counter() - began
    if len(found.values["cos_F"]) != PAIRS:
        raise AssertionError("pairs are missing")
    ratio = seconds / (2 * PAIRS * each)
    print(f"{PAIRS} pairs of lenet: {seconds:.1f} s, {ratio:.2f} of their Jacobians by plain backwards", flush=True)
    return {"model": "lenet", "pairs": PAIRS, "seconds": seconds, "ratio": ratio}


def main() -> None:
    """Measure, and write the result after every part."""
    torch.set_num_threads(2)
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    content: dict[str, Any] = {
        "images": images,
        "shape": SHAPE,
        "classes": CLASSES,
        "goals": GOALS,
        "load_at_start": os.getloadavg()[0],
        "threads": 2,
        "environment": environment("cpu"),
        "pairs": pairs(),
        "spectrum": [],
    }
    for name in ("lenet5", "resnet20"):
        content["spectrum"].append(compare(name, images))
        write_json(OUT, content)


if __name__ == "__main__":
    main()
