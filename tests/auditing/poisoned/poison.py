"""What a poisoned model is, and the parts that several of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gambeson.auditing import AuditResult
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate


@dataclass(frozen=True)
class Nets:
    """Trained networks by name, and the data they were trained on."""

    data: Dataset
    get: Callable[[str], nn.Module]

    def __call__(self, name: str = "standard") -> nn.Module:
        """A copy of a trained network, in evaluation mode: what is done to it harms no other model."""
        return copy.deepcopy(self.get(name)).eval()


def plain(nets: Nets) -> tuple[Any, ...]:
    """What most are made of: one network trained as usual."""
    return (nets(),)


def three(nets: Nets) -> tuple[Any, ...]:
    """Three networks that differ in their seed."""
    return ([nets(name) for name in ("standard", "standard 1", "standard 2")],)


@dataclass(frozen=True)
class Poison:
    """A model that looks more robust than it is."""

    name: str
    kind: Callable[..., nn.Module]
    """Its docstring says what it does."""
    fakes: str
    """What a careless evaluation would believe."""
    ought: tuple[str, ...] = ()
    """Diagnostics of which one at least ought to fail; empty: the attacks ought to break it."""
    source: str = ""
    """The paper that proposed it or took it apart, or the complaint it stands for."""
    settings: tuple[Any, ...] = ()
    parts: Callable[[Nets], tuple[Any, ...]] = plain
    """From the trained networks to what ``kind`` is made of."""

    def make(self, nets: Nets) -> nn.Module:
        """Build the model."""
        return self.kind(*self.parts(nets), *self.settings).eval()


def worst(result: AuditResult) -> tuple[Rate, Rate]:
    """The highest error under one pattern and the lowest accuracy under one an image, at the middle eps.

    Perturbations that were crafted on another model count too: the audit's verdict names them.
    """
    eps = result.middle.eps
    transferred = [one for one in result.transfer if one.eps == eps]
    errors = [result.middle.uer, *(one.error for one in transferred if one.universal)]
    rates = [one.accuracy for one in result.per_image if one.eps == eps]
    rates += [one.error.complement for one in transferred if not one.universal]
    return max(errors, key=lambda rate: rate.value), min(rates, key=lambda rate: rate.value)


def broken(found: tuple[Rate, Rate], base: tuple[Rate, Rate]) -> dict[str, bool]:
    """Whether a model was brought to what the undefended network underneath shows, within its interval, or below.

    Args:
        found: :func:`worst` of the model.
        base: :func:`worst` of the network.
    """
    return {"universal": found[0].high >= base[0].low, "per image": found[1].low <= base[1].high}


class Trunk(nn.Module):
    """A network of this library without its last layer: images (N, C, H, W) to features (N, D)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = net.body.fc3
        net.body.fc3 = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def spread(split: Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels taken at even distances: a split may be in order of class."""
    rows = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
    return split.take(rows, torch.device("cpu"))


@torch.no_grad()
def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Outputs of a deterministic model, in batches."""
    return torch.cat([model(part) for part in images.split(500)])


def fitted_head(features: nn.Module, data: Dataset, scale: float = 10.0) -> nn.Linear:
    """A last layer by ridge regression on one-hot targets, for features that were changed after training."""
    images, labels = spread(data.train, 3000)
    h = answers(features, images).double()
    ones = torch.cat([h, torch.ones(len(h), 1).double()], 1)
    targets = nn.functional.one_hot(labels, data.num_classes).double()
    gram = ones.T @ ones + 1e-4 * len(h) * torch.eye(ones.shape[1]).double()
    weight = torch.linalg.solve(gram, ones.T @ targets) * scale
    head = nn.Linear(h.shape[1], data.num_classes)
    with torch.no_grad():
        head.weight.copy_(weight[:-1].T)
        head.bias.copy_(weight[-1])
    return head
