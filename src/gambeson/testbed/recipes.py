"""The networks of the testbed: training recipes, data, and cached weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import UserError, load_tensors, save_tensors, seeded, unknown_name
from gambeson.data import Dataset
from gambeson.data import load as load_data
from gambeson.data.load import data_root
from gambeson.defenses import Defense, create
from gambeson.defenses.objective import Adversarial, Clean, Term
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.models import create as create_model
from gambeson.testbed.entry import Entry, Networks
from gambeson.training import train as train_network


class KWinners(nn.Module):
    """Keeps the largest tenth of the activations of an image and sets the others to zero (Xiao et al. 2020)."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return the activations, most of them zero."""
        flat = h.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


class Linear(nn.Module):
    """Logits W x + b."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(data.train.shape), data.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return self.linear(x.flatten(1))


def _lenet5(data: Dataset, defense: Defense) -> Any:
    return create_model("lenet5", data, members=defense.num_members)


def _with_winners(data: Dataset, defense: Defense) -> nn.Module:
    net = _lenet5(data, defense)
    for name in ("relu1", "relu2", "relu3", "relu4"):
        setattr(net.body, name, KWinners())
    return net


def _with_batch_norm(data: Dataset, defense: Defense) -> nn.Module:
    net = _lenet5(data, defense)
    for name, width in (("conv1", 6), ("conv2", 16)):
        setattr(net.body, name, nn.Sequential(getattr(net.body, name), nn.BatchNorm2d(width)))
    return net


class Lipschitz(nn.Module):
    """Two layers of spectral norm 1, times 20: the logits move at most 20 times as far as the image."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.first = norm(nn.Linear(math.prod(data.train.shape), 256))
        self.last = norm(nn.Linear(256, data.num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return 20 * self.last(self.first(x.flatten(1) - 0.5).relu())


@dataclass(frozen=True)
class Recipe:
    """Training recipe of a network."""

    about: str
    """What it is, in one sentence."""

    defense: Callable[[float], Defense]
    """Maps the eps of the data to the defence it is trained with."""
    build: Callable[[Dataset, Defense], nn.Module] = _lenet5
    epochs: float = 1.0
    """Epochs, relative to those of the caller."""
    seed: int = 0
    source: str = ""
    """The paper of the training method."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the training that differ from the default."""
    on_test: bool = False
    """Whether it is trained on the test images, as by a leak."""
    alone: bool = True
    """Whether it is a model of the testbed itself, and not only a part of others."""


class SingleStep(PGDAdversarial):
    """Half the loss on clean images, half on single steps of eps from the image itself (Tramèr et al. 2018, 3.1)."""

    steps: Literal[1] = 1

    def terms(self) -> dict[str, tuple[float, Term]]:
        """Return the two terms."""
        step = Adversarial(eps=self.eps, steps=1, rel_step_size=1.0, start="zero")
        return {"clean": (0.5, Clean()), "adversarial": (0.5, step)}


def _plain(_: float) -> Defense:
    return create("standard")


_PLAIN, _PGD = "LeNet-5 trained on clean images.", "Trained on PGD's adversarial examples."
_SHARED, _HEAPS = "Trained on perturbations that heaps of images share.", "Mummadi et al. 2019"
_NOISE = {"places": ("relu1",), "noise_from": 0}
_MADRY = "Madry et al. 2018"
NETWORKS = {
    "standard": Recipe(_PLAIN, _plain),
    "standard 1": Recipe(_PLAIN, _plain, seed=1),
    "standard 2": Recipe(_PLAIN, _plain, seed=2),
    "pgd-adversarial": Recipe(_PGD, lambda eps: create("pgd-adversarial", eps=eps), source=_MADRY),
    "pgd-adversarial 1": Recipe(_PGD, lambda eps: create("pgd-adversarial", eps=eps), seed=1, source=_MADRY),
    "shared-adversarial": Recipe(
        _SHARED, lambda eps: create("shared-adversarial", eps=eps, sharedness=16), source=_HEAPS
    ),
    "shared-adversarial 1": Recipe(
        _SHARED, lambda eps: create("shared-adversarial", eps=eps, sharedness=16), seed=1, source=_HEAPS
    ),
    "shared-adversarial 2": Recipe(
        _SHARED, lambda eps: create("shared-adversarial", eps=eps, sharedness=64), seed=2, source=_HEAPS
    ),
    "universal-consistency": Recipe(
        "Trained to answer alike with and without one shared perturbation.",
        lambda eps: create("universal-consistency", eps=eps),
    ),
    "jacobian": Recipe(
        "Trained with a penalty on the norm of its input Jacobian.",
        lambda eps: create("jacobian", strength=0.01),
        source="Hoffman et al. 2019",
    ),
    "trades": Recipe(
        "Trained to answer alike on clean and adversarial images.",
        lambda eps: create("trades", eps=eps),
        source="Zhang et al. 2019",
    ),
    "learn2perturb": Recipe(
        "Carries learnt feature noise, in training and at inference.",
        lambda eps: create("learn2perturb", eps=eps, **_NOISE),
        source="Jeddi et al. 2020",
    ),
    "ensemble of 3": Recipe("The mean probability of three networks.", lambda eps: create("ensemble", members=3)),
    "linear": Recipe("Softmax regression.", _plain, lambda data, defense: Linear(data)),
    "untrained": Recipe("LeNet-5 as it was drawn.", _plain, epochs=0, alone=False),
    "batch-norm": Recipe("LeNet-5 with BatchNorm.", _plain, _with_batch_norm, alone=False),
    "k-winners": Recipe(
        "LeNet-5 with k-winners-take-all for ReLU.", _plain, _with_winners, epochs=4, settings={"lr": 0.1}, alone=False
    ),
    "single-step": Recipe(
        "Trained on single steps of 0.4.", lambda _: SingleStep(eps=0.4), epochs=2, settings={"lr": 0.1}, alone=False
    ),
    "pgd-adversarial on test": Recipe(
        "Trained on adversarial examples of the test images.",
        lambda eps: create("pgd-adversarial", eps=1.5 * eps),
        epochs=8,
        on_test=True,
        alone=False,
    ),
    "Lipschitz": Recipe(
        "Layers of spectral norm one.", _plain, lambda data, defense: Lipschitz(data), epochs=2, alone=False
    ),
}


def _itself(net: nn.Module) -> nn.Module:
    """The network itself."""
    return net


def _honest(name: str, recipe: Recipe) -> Entry:
    return Entry("honest", name, _itself, recipe.about, source=recipe.source, parts=lambda nets: (nets(name),))


HONEST = tuple(_honest(name, recipe) for name, recipe in NETWORKS.items() if recipe.alone)
"""The honest networks, which an audit must trust."""


@dataclass(frozen=True)
class DataSettings:
    """Settings of a data set."""

    eps: float
    """Radius of adversarial training (l-infinity, pixels in [0, 1])."""
    radius: float
    """Radius of the ground truth: the middle one of the audit's suites."""
    epochs: int = 6
    """Epochs, with batches of 64."""
    images: tuple[int, int, int] | None = None
    """Size of train, validation and test, stratified subsets for training in minutes; None: all images."""
    without: tuple[str, ...] = ()
    """Names of models that lose more than 14 points of clean accuracy on such images, or cannot read them."""


DATA = {
    "digits": DataSettings(eps=0.1, radius=0.15, epochs=15),
    "mnist5k": DataSettings(eps=0.1, radius=0.15, epochs=10),
    "fashion-mnist": DataSettings(eps=0.1, radius=0.15, images=(6_000, 500, 1_000)),
    "cifar10": DataSettings(
        eps=4 / 255,
        radius=12 / 255,
        images=(8_000, 500, 1_000),
        without=(
            "two grey levels",
            "threshold at one half",
            "squashing loop on pixels",
            "purifier loop",
            "logit noise",
            "dropped pixels",
            "random errors",
            "pulled to training images",
            "diffusion purification",
            "grey to colour",
        ),
    ),
}
"""The data sets of the testbed."""


def settings_of(data: str) -> DataSettings:
    """Return the settings of a data set of the testbed.

    Raises:
        UserError: the testbed does not have this data.
    """
    if data not in DATA:
        raise unknown_name("data of the testbed", data, DATA)
    return DATA[data]


@cache
def networks(data: str) -> Networks:
    """Return the networks on a data set of :data:`DATA`, each trained on first use.

    Their weights are cached in ``testbed/`` of the data folder ($GAMBESON_DATA, else ~/.cache/gambeson).
    """
    settings, dataset = settings_of(data), load_data(data)
    if settings.images is not None:
        train, validation, test = (
            split.subset(torch.arange(count))
            for split, count in zip((dataset.train, dataset.validation, dataset.test), settings.images, strict=True)
        )
        dataset = Dataset(dataset.name, train, validation, test, dataset.classes)
    return networks_on(dataset, data_root(None) / "testbed" / data, eps=settings.eps, epochs=settings.epochs)


def networks_on(data: Dataset, folder: Path | None = None, *, eps: float = 0.2, epochs: int = 6) -> Networks:
    """Return networks of :data:`NETWORKS` on any data, each trained on first use.

    Args:
        data: the training data.
        folder: cache of their weights; None: in memory only. Weights of another recipe, other data or another version
            of torch are replaced.
        eps: radius of adversarial training.
        epochs: of training; batches of 64.
    """

    @cache
    @torch.enable_grad()  # it may be called inside no_grad
    def get(name: str) -> nn.Module:
        recipe = NETWORKS[name]
        defense = recipe.defense(eps)
        with seeded(recipe.seed, "model"):
            net = recipe.build(data, defense)
        rounds = round(epochs * recipe.epochs)
        own = Dataset(data.name, data.test, data.validation, data.test, data.classes) if recipe.on_test else data
        settings: dict[str, Any] = {"lr": 0.05, "batch_size": 64} | recipe.settings
        made_of = {
            "build": recipe.build.__name__,
            "defense": {"name": type(defense).__name__, **defense.plain()},
            "training": settings | {"epochs": rounds, "seed": recipe.seed},
            "data": own.train.fingerprint,
            "torch": torch.__version__,
        }
        path = None if folder is None else folder / f"{name.replace(' ', '-')}.safetensors"
        if path is not None and (weights := _kept(path, made_of)) is not None:
            defense.configure_model(net)
            net.load_state_dict(weights)
            return net.eval()
        if rounds:
            train_network(net, own, defense, epochs=rounds, seed=recipe.seed, label=f"testbed: {name}", **settings)
        if path is not None:
            save_tensors(path, net.state_dict(), {"made_of": made_of})
        return net.eval()

    return Networks(data, get)


def _kept(path: Path, made_of: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    if not path.is_file():
        return None
    try:
        weights, about = load_tensors(path)
    except UserError:  # damaged: trained again and replaced
        return None
    return weights if about.get("made_of") == made_of else None
