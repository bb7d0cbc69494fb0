"""Audits of the public plain and adversarially trained LeNet5: ``python benchmarks/public_lenet.py --weights FOLDER``.

The weights, ``mnist_lenet5_clntrained.pt`` and ``mnist_lenet5_advtrained.pt``, stand in the source archive of
advertorch 0.2.3 (advertorch_examples/trained_models); they are read with ``weights_only=True``. The plain one must come
out broken by one pattern, the other trusted and not broken. A cut audit goes on; the results are stored under
``results/public-lenet5``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from stored import RESULTS
from torch import nn

import gambeson as gb
from gambeson.auditing import SUITES

RUNS, OUT = Path("runs/public-lenet5"), RESULTS / "public-lenet5"
EPS = (0.1, 0.2, 0.3, 0.35, 0.4)
"""With the radius 0.3 that the second was trained against in the middle."""


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
    """Audit both, store the results, say the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    arguments = parser.parse_args()
    data = gb.data.load("mnist")
    suite = SUITES[arguments.suite].model_copy(update={"eps": EPS, "suite_images": 200})
    for name, file in (("plain", "clntrained"), ("adversarial", "advtrained")):
        model = lenet5(arguments.weights / f"mnist_lenet5_{file}.pt")
        found = gb.audit(model, data, suite, RUNS / name, label=f"public LeNet5, {name}")
        OUT.mkdir(parents=True, exist_ok=True)
        shutil.copy(RUNS / name / "result.json", OUT / f"{name}.json")
        print(f"{name}: trusted {found.verdict.trusted}. {found.verdict.summary}")


if __name__ == "__main__":
    main()
