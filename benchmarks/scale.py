"""At which scale of the logits does cross-entropy lead an attack best? ``python benchmarks/scale.py``.

Plain and PGD-trained LeNet-5 on digits, MNIST, Fashion-MNIST and CIFAR-10 (the networks of the testbed),
whose logits are divided by the temperature that calibrates them, and by multiples of it. Stochastic PGD (crafted on
train, two seeds) and PGD of 20 steps at one eps each; all rates are of validation images, for they choose the setting
of :mod:`gambeson.victim.temperature`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from stored import RESULTS, Rows

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD
from gambeson.evaluation import accuracy_under
from gambeson.testbed import networks
from gambeson.victim import Victim
from gambeson.victim.temperature import USUAL, calibrating

MULTIPLES = (32, 8, 2, 1, 0.5, 0.125, 0.03125)
CASES = (
    ("digits", "standard", 0.15),
    ("digits", "pgd-adversarial", 0.15),
    ("mnist5k", "standard", 0.2),
    ("mnist5k", "pgd-adversarial", 0.2),
    ("fashion-mnist", "standard", 0.1),
    ("fashion-mnist", "pgd-adversarial", 0.15),
    ("cifar10", "standard", 12 / 255),
    ("cifar10", "pgd-adversarial", 12 / 255),
)
SEEDS, IMAGES = (0, 1), 500


def measure(
    data: gb.data.Dataset, model: torch.nn.Module, eps: float, multiples: tuple[float, ...] = ()
) -> list[dict[str, Any]]:
    """Attack one network at some scales, or at every one; the model's own then stands first."""
    found = []
    few = data.validation.subset(torch.arange(min(IMAGES, len(data.validation))))
    with Victim(model, fast=True) as victim:
        victim.inspect(few.take(slice(0, 8))[0])
        own = calibrating(victim, data.validation, 0)
        for multiple in multiples or (1 / own, *MULTIPLES):
            victim.temperature = own * multiple
            rates = []
            for seed in SEEDS:
                attack = StochasticPGD(eps=eps, steps=100, probe_starts=2, truncate_margin=0.0)
                uap = attack.craft(victim, data, seed=seed)
                rates.append(max(rate for _, rate in uap.about.restarts))
            accuracy = accuracy_under(victim, few, PGD(eps=eps, steps=20), 0).plain()
            found.append({"multiple": multiple, "uer": rates, "pgd accuracy": accuracy})
            print(f"  {multiple:7.3g}: UER {rates}, accuracy under PGD {accuracy['value']:.3f}", flush=True)
    return found


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {f"{name}, {kind}": (name, kind, eps) for name, kind, eps in CASES}
    settings = {"usual": list(USUAL), "multiples": list(MULTIPLES), "seeds": list(SEEDS), "images": IMAGES}
    rows = Rows(arguments.out, "python benchmarks/scale.py", settings)
    for key in rows.missing(cases):
        name, kind, eps = cases[key]
        print(f"{key}, eps {eps}")
        nets = networks(name)
        rows.add(key, {"data": name, "net": kind, "eps": eps, "scales": measure(nets.data, nets(kind), eps)})


if __name__ == "__main__":
    main()
