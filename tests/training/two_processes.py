"""Train every defence for an epoch and save the weights: run alone, and by torchrun in two processes."""

import sys
from pathlib import Path

import torch

import gambeson as gb
from gambeson.base import place
from gambeson.data import Dataset

RANDOM = {"learn2perturb", "pni", "rse"}
"""Their models draw noise in the forward, each process its own, as dropout does."""
MORE = {
    "shared-adversarial": {"sharedness": 8},
    "ensemble": {"members": 2},
    "jacobian-ensemble": {"members": 2},
    "adp": {"members": 2},
    "gal": {"members": 2},
    "trs": {"members": 2},
    "combination": {"risk": {"name": "pgd-adversarial", "eps": 0.1}, "jacobian": {"strength": 0.01}},
}


def defenses():
    for name in gb.defenses.names():
        if name not in RANDOM:
            eps = {"eps": 0.1} if gb.defenses.needs_eps(name) else {}
            yield name, gb.defenses.create(name, **eps, **MORE.get(name, {}))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    data = gb.data.load("digits")
    few = Dataset("few", data.train.subset(torch.arange(192)), data.validation, data.test, data.classes)
    for name, defense in defenses():
        torch.manual_seed(0)
        model = gb.models.create("lenet5", data, members=defense.num_members)
        history = gb.train(model, few, defense, epochs=1, batch_size=64, lr=0.05, seed=1)
        if place()[0] == 0:
            gb.models.save(model, out / f"{name}.safetensors", {"accuracy": history[-1]["validation_accuracy"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
