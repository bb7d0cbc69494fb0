"""Time to reach what ART's DeepFool-UAP reaches, on Fashion-MNIST with LeNet: ``python benchmarks/universal.py``.

ART crafts on ``--images`` training images; our stochastic PGD is then given a growing number of steps until its error
on the same held-out images is at least as high. Both are timed in this one process. ART comes with the extra ``bench``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import StochasticPGD, UniversalPerturbation
from gambeson.base import environment, seeded, write_json
from gambeson.victim import Victim


def art_perturbation(model: nn.Module, images: torch.Tensor, eps: float, classes: int) -> torch.Tensor:
    """Craft ART's universal perturbation with DeepFool inside, at its defaults but for eps and one pass."""
    from art.attacks.evasion import UniversalPerturbation as Art
    from art.estimators.classification import PyTorchClassifier

    shape = tuple(images.shape[1:])
    loss = nn.CrossEntropyLoss()
    wrapped = PyTorchClassifier(
        model, loss, input_shape=shape, nb_classes=classes, clip_values=(0, 1), device_type="cpu"
    )
    attack = Art(wrapped, attacker="deepfool", eps=eps, norm=np.inf, max_iter=1, verbose=False)
    attack.generate(images.numpy())
    return torch.from_numpy(np.asarray(attack.noise, dtype=np.float32)).reshape(1, *shape)


def main() -> None:
    """Train, craft both ways, store times and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("results/bench-universal.json"))
    arguments = parser.parse_args()
    eps = arguments.eps
    data = gb.data.load("fashion-mnist")
    with seeded(0, "model"):
        model = gb.models.create("lenet", data)
    few = data.train.subset(torch.arange(10_000))
    small = gb.data.Dataset(data.name, few, data.validation, data.test, data.classes)
    gb.train(model, small, gb.defenses.Standard(), epochs=2, seed=0)
    model.eval()
    clean = gb.evaluation.accuracy(model, data).complement
    images, _ = few.take(slice(0, arguments.images))
    began = time.perf_counter()
    noise = art_perturbation(model, images, eps, len(data.classes)).clamp(-eps, eps)
    art_seconds = time.perf_counter() - began
    probe = StochasticPGD(eps=eps, steps=1, batch_size=128, probe_starts=0).craft(model, small)
    art_error = gb.evaluation.universal_evasion(model, data, UniversalPerturbation(noise, probe.about))
    print(f"clean error {clean}; ART: {art_error} in {art_seconds:.1f} s")
    rows = []
    for steps in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        with Victim(model, fast=True) as victim:
            began = time.perf_counter()
            uap = StochasticPGD(
                eps=eps, steps=steps, batch_size=128, probe_starts=0, rel_step_size=max(0.25, 1 / steps)
            ).craft(victim, small)
            seconds = time.perf_counter() - began
        error = gb.evaluation.universal_evasion(model, data, uap)
        rows.append({"steps": steps, "seconds": seconds, "error": error.plain()})
        print(f"{steps:4} steps: {error} in {seconds:.2f} s, {art_seconds / seconds:.0f} times as fast as ART")
        if error.value >= art_error.value:
            break
    content = {
        "eps": eps,
        "art": {"images": arguments.images, "seconds": art_seconds, "error": art_error.plain()},
        "clean_error": clean.plain(),
        "gambeson": rows,
        "environment": environment(),
    }
    write_json(arguments.out, content)


if __name__ == "__main__":
    main()
