"""Train with every defence, on images or label maps, and save the weights: run alone, and by torchrun in two."""

import sys
from pathlib import Path

import torch

import gambeson as gb
from gambeson.base import leave_processes, place, save_tensors
from gambeson.data import Dataset, Split

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
MAPS: dict[str, dict] = {
    "standard": {},
    "shared-adversarial": {"eps": 0.1, "sharedness": 4, "target": "prediction", "tau": None},
    "universal-consistency": {"eps": 0.1, "warmup": 0},
    "jacobian": {"strength": 0.1, "share": 0.5},
}
"""What is trained on label maps as well."""


def maps(data):
    """Digits with their ink as a label map; the first row has no label."""

    def split(one):
        labels = (one.images[:, 0] > 100).long()
        labels[:, 0] = 255
        return Split(one.name, one.images, labels, ("paper", "ink"), ignore_index=255)

    return Dataset("maps", split(data.train), split(data.validation), split(data.test), ("paper", "ink"))


def defenses():
    for name in gb.defenses.names():
        if name not in RANDOM:
            eps = {"eps": 0.1} if gb.defenses.entry(name).needs("eps") else {}
            yield name, gb.defenses.create(name, **eps, **MORE.get(name, {}))


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    data = gb.data.load("digits")
    few = Dataset("few", data.train.subset(torch.arange(128)), data.validation, data.test, data.classes)
    {"images": on_images, "maps": on_maps}[kind](few, out)
    leave_processes()


def on_images(few: Dataset, out: Path) -> None:
    for name, defense in defenses():
        torch.manual_seed(0)
        model = gb.models.create("lenet5", few, members=defense.num_members)
        history = gb.train(model, few, defense, epochs=1, batch_size=64, lr=0.05, seed=1)
        if place()[0] == 0:
            gb.models.save(model, out / f"{name}.safetensors", {"accuracy": history[-1]["validation_accuracy"]})


def on_maps(few: Dataset, out: Path) -> None:
    for name, settings in MAPS.items():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 2, 1))
        defense = gb.defenses.create(name, **settings)
        history = gb.train(net, maps(few), defense, epochs=2, batch_size=32, lr=0.05, seed=1)
        if place()[0] == 0:
            save_tensors(out / f"maps-{name}.safetensors", net.state_dict(), {"last": history[-1]})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
