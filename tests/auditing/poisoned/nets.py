"""The networks that are poisoned, and the honest ones: what they are, how they are trained, and where they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gambeson as gb
from gambeson.base import seeded
from gambeson.data import Dataset
from gambeson.defenses import Defense, create
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.defenses.terms import Adversarial, Clean, Term
from tests.auditing.poisoned.poison import Nets


class KWinners(nn.Module):
    """Keeps the largest tenth of the activations of an image and sets the others to zero (Xiao et al. 2020)."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        flat = h.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


class Linear(nn.Module):
    """Logits W x + b."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(data.train.shape), data.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


def _lenet5(data: Dataset, defense: Defense) -> nn.Module:
    return gb.models.create("lenet5", data, members=defense.num_members)


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


@dataclass(frozen=True)
class Recipe:
    """How a network comes about."""

    defense: Callable[[float], Defense]
    """From the eps that suits the data to the defence it is trained with."""
    build: Callable[[Dataset, Defense], nn.Module] = _lenet5
    epochs: float = 1.0
    """As a share of the epochs that the caller trains for."""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


class SingleStep(PGDAdversarial):
    """Half the loss on clean images, half on single steps of eps from the image itself (Tramèr et al. 2018, 3.1)."""

    steps: Literal[1] = 1

    def terms(self) -> dict[str, tuple[float, Term]]:
        step = Adversarial(eps=self.eps, steps=1, step=1.0, start="zero")
        return {"clean": (0.5, Clean()), "adversarial": (0.5, step)}


def _plain(_: float) -> Defense:
    return create("standard")


_NOISE = {"places": ("relu1",), "noise_from": 0}
RECIPES = {
    "standard": Recipe(_plain),
    "standard 1": Recipe(_plain, seed=1),
    "standard 2": Recipe(_plain, seed=2),
    "pgd-adversarial": Recipe(lambda eps: create("pgd-adversarial", eps=eps)),
    "pgd-adversarial 1": Recipe(lambda eps: create("pgd-adversarial", eps=eps), seed=1),
    "shared-adversarial": Recipe(lambda eps: create("shared-adversarial", eps=eps, sharedness=16)),
    "shared-adversarial 1": Recipe(lambda eps: create("shared-adversarial", eps=eps, sharedness=16), seed=1),
    "shared-adversarial 2": Recipe(lambda eps: create("shared-adversarial", eps=eps, sharedness=64), seed=2),
    "universal-consistency": Recipe(lambda eps: create("universal-consistency", eps=eps)),
    "jacobian": Recipe(lambda eps: create("jacobian", strength=0.01)),
    "trades": Recipe(lambda eps: create("trades", eps=eps)),
    "learn2perturb": Recipe(lambda eps: create("learn2perturb", eps=eps, **_NOISE)),
    "ensemble of 3": Recipe(lambda eps: create("ensemble", members=3)),
    "linear": Recipe(_plain, lambda data, defense: Linear(data)),
    # What only poisoned models are made of.
    "untrained": Recipe(_plain, epochs=0),
    "batch-norm": Recipe(_plain, _with_batch_norm),
    "k-winners": Recipe(_plain, _with_winners),
    "single-step": Recipe(lambda _: SingleStep(eps=0.4), epochs=2, settings={"lr": 0.1}),
}
HONEST = tuple(name for name in RECIPES if name not in {"untrained", "batch-norm", "k-winners", "single-step"})
"""Networks that an audit must trust."""


def nets(data: Dataset, folder: Path | None = None, *, eps: float = 0.2, epochs: int = 6, lr: float = 0.05) -> Nets:
    """Networks of :data:`RECIPES` on ``data``, each trained when it is first asked for, and kept in ``folder``.

    Args:
        data: what they are trained on.
        folder: where their weights lie; None: they are kept in memory only.
        eps: what the adversarial ones are trained against.
        epochs: of training; batches of 64.
        lr: learning rate.
    """

    @cache
    def get(name: str) -> nn.Module:
        recipe = RECIPES[name]
        defense = recipe.defense(eps)
        with seeded(recipe.seed, "model"):
            net = recipe.build(data, defense)
        path = None if folder is None else folder / f"{name.replace(' ', '-')}.safetensors"
        if path is not None and path.is_file():
            defense.prepare(net)
            net.load_state_dict(load_file(path))
            return net.eval()
        if rounds := round(epochs * recipe.epochs):
            settings = {"lr": lr, "batch_size": 64} | recipe.settings
            gb.train(net, data, defense, epochs=rounds, seed=recipe.seed, **settings)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous().clone() for key, value in net.state_dict().items()}, path)
        return net.eval()

    return Nets(data, get)
