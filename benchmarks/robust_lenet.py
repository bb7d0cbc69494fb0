"""The standard row on the public adversarially trained LeNet5, and on request a public AutoAttack beside it.

``python benchmarks/robust_lenet.py --weights mnist_lenet5_advtrained.pt --images 200 [--autoattack]``

The weights stand in the source archive of advertorch 0.2.3 (advertorch_examples/trained_models); they are read with
``weights_only=True``. AutoAttack (pyautoattack) comes with the extra ``bench``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import PGD
from gambeson.base import environment, write_json
from gambeson.evaluation import run_suite, standard_suite
from gambeson.victim import Victim

EPS = 0.3


def lenet5(weights: Path) -> nn.Module:
    """Rebuild the network that the file's shapes describe: two 3 x 3 convolutions, 32 and 64 maps, linear 200."""
    found = torch.load(weights, map_location="cpu", weights_only=True)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )
    own = model.state_dict()
    model.load_state_dict(dict(zip(own, found.values(), strict=True)))
    return model.eval()


def main() -> None:
    """Check the reference point, run the row, store what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--autoattack", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/robust-lenet5.json"))
    arguments = parser.parse_args()
    model, test = lenet5(arguments.weights), gb.data.load("mnist").test
    content: dict[str, object] = {"eps": EPS, "images": arguments.images, "environment": environment()}
    with Victim(model, fast=True) as victim:
        reference = run_suite(
            victim, test.subset(torch.arange(500)), {"pgd-40": PGD(eps=EPS, steps=40, rel_step_size=0.01 / EPS)}
        ).result
        print(f"PGD-40, step 0.01, first 500: {reference.robust} (public reference 0.934)")
        few = test.subset(torch.arange(arguments.images))
        began = time.perf_counter()
        found = run_suite(victim, few, standard_suite(eps=EPS)).result
        seconds = time.perf_counter() - began
    content |= {"pgd40": reference.plain(), "standard": found.plain(), "seconds": seconds}
    for part in found.rounds:
        print(f"{part.attack:18} broke {part.broken:3} of {part.tried}: {part.accuracy}")
    print(f"standard row: {found.robust} in {seconds:.0f} s")
    if arguments.autoattack:
        from pyautoattack import AutoAttack

        x, y = few.take(slice(None))
        began = time.perf_counter()
        attack = AutoAttack(model, norm="Linf", eps=EPS, version="standard", device="cpu", seed=0)
        moved = attack.run_standard_evaluation(x, y, batch_size=250)
        moved = moved[0] if isinstance(moved, tuple) else moved
        with torch.no_grad():
            left = float((model(moved).argmax(1) == y).float().mean())
        content |= {"autoattack": left, "autoattack_seconds": time.perf_counter() - began}
        print(f"AutoAttack: {left:.4f} in {content['autoattack_seconds']:.0f} s")
    write_json(arguments.out, content)


if __name__ == "__main__":
    main()
