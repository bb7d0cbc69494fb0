"""Honest models of unusual kinds, and what the audit says of them: ``python benchmarks/odd_models.py``.

All are on the digits at eps 0.15, and none is made to deceive. The truth is an upper bound on robustness, as in
``benchmarks/adversary.py``: PGD and a universal perturbation crafted on the model, and on a smooth twin where it has
one. A row is stored in ``results/odd_models.json`` when it is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from adversary import Deceiver, store
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.base import seeded
from gambeson.testbed.recipes import networks


class Median(nn.Module):
    """The median of three by three pixels, before a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, 1, H, W)."""
        patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)
        return self.net(patches.view(len(x), 9, -1).median(1).values.view_as(x))


class Half(nn.Module):
    """A copy of a network with weights in half precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return self.net(x.half())


class Votes(nn.Module):
    """The class that most networks name; where as many name two, the sum of the logits decides."""

    def __init__(self, nets: list[nn.Module], *, hard: bool = True) -> None:
        super().__init__()
        self.nets, self.hard = nn.ModuleList(nets), hard

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return votes and logits of images (N, C, H, W)."""
        z = torch.stack([net(x) for net in self.nets])
        return z.mean(0) + 100.0 * self.hard * F.one_hot(z.argmax(2), z.shape[2]).sum(0)


class Sign(torch.autograd.Function):
    """The sign, with the gradient of a clipped identity (Courbariaux et al. 2016)."""

    @staticmethod
    def forward(ctx, h):  # noqa: D102
        ctx.save_for_backward(h)
        return torch.where(h >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        (h,) = ctx.saved_tensors
        return gradient * (h.abs() <= 1)


class Signs(nn.Module):
    """A perceptron whose features are signs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)
        self.norms = nn.ModuleList([nn.BatchNorm1d(256), nn.BatchNorm1d(256)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, 1, 8, 8)."""
        h = Sign.apply(self.norms[0](self.first(x.flatten(1))))
        return self.last(Sign.apply(self.norms[1](self.second(h))))


class Neighbours(nn.Module):
    """Votes of the fifteen training images whose features are nearest."""

    def __init__(self, net: nn.Module, data: gb.data.Dataset) -> None:
        super().__init__()
        images, labels = data.train.take(slice(0, 500))
        self.net, self.labels = net, nn.Buffer(F.one_hot(labels, data.num_classes).float())
        with torch.no_grad():
            self.known = nn.Buffer(F.normalize(net(images), dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return log probabilities of images (N, C, H, W)."""
        near, which = (F.normalize(self.net(x), dim=1) @ self.known.T).topk(15, 1)
        return (((near / 0.05).softmax(1)[:, :, None] * self.labels[which]).sum(1) + 1e-3).log()


class Exits(nn.Module):
    """A small classifier answers where it is sure, a larger one elsewhere."""

    def __init__(self, small: nn.Module, large: nn.Module) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        first = self.small(x)
        return torch.where((first.softmax(1).amax(1) > 0.9)[:, None], first, self.large(x))


class Experts(nn.Module):
    """Four experts, of which a linear gate asks one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.hidden, self.last = nn.Linear(64, 4), nn.Linear(64, 4 * 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, 1, 8, 8)."""
        weight, which = self.gate(x.flatten(1)).softmax(1).max(1)
        features = self.hidden(x.flatten(1)).view(len(x), 4, 64)[torch.arange(len(x)), which]
        return self.last(features.relu() * weight[:, None])


def odd_models() -> dict[str, Callable[[], Deceiver]]:
    """Every model, by name; made when it is asked for."""
    nets = networks("digits")

    def trained(net: Callable[[], nn.Module]) -> nn.Module:
        with seeded(0, "odd"):
            model = net()
            gb.train(model, nets.data, gb.defenses.Standard(), epochs=40, batch_size=64, lr=0.05, seed=0)
        return model.eval()

    def itself(net: nn.Module) -> Deceiver:
        return Deceiver(net, net)

    def small() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def members() -> list[nn.Module]:
        return [nets(name) for name in ("standard", "standard 1", "standard 2")]

    return {
        "median of pixels": lambda: itself(trained(lambda: Median(gb.models.create("lenet5", nets.data)))),
        "weights in half precision": lambda: Deceiver(Half(nets()), nets()),
        "a small network where it is sure": lambda: itself(Exits(trained(small), nets())),
        "one of four experts": lambda: itself(trained(Experts)),
        "hard votes of three networks": lambda: Deceiver(Votes(members()), Votes(members(), hard=False)),
        "signs as features": lambda: itself(trained(Signs)),
        "votes of nearest training images": lambda: Deceiver(Neighbours(nets(), nets.data), nets()),
    }


if __name__ == "__main__":
    store("odd_models", odd_models())
