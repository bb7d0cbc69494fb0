"""What answers by more than the image: by what was asked before, by who asks, or by the test itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.auditing.poisoned.poison import Nets, Poison, spread

ALIVE, WHOLE, TRUE = "gradients alive", "unbounded attack succeeds", "gradients tell the truth"
BOTH, AGAIN = (ALIVE, WHOLE), "remembers queries"


def _coarse(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 7).flatten(1)


class Remembering(nn.Module):
    """Keeps a coarse copy of what it was asked; an image close to one of those is a repeated query.

    Args:
        net: answers what is new.
        reply: ``constant``: class 0; ``random``: random logits; ``first``: what the first of its kind was answered,
            with the gradient of the network, so that it looks alive.
        near: largest Euclidean distance of coarse copies, 7 x 7, between repetitions.
    """

    def __init__(self, net: nn.Module, reply: str, near: float) -> None:
        super().__init__()
        self.net, self.reply, self.near = net, reply, near
        self.seen: list[torch.Tensor] = []
        self.said: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, coarse = self.net(x), _coarse(x.detach())
        known = torch.zeros(len(x), dtype=torch.bool)
        given = z.detach().clone()
        if self.seen:
            gap, which = torch.cdist(coarse, torch.cat(self.seen)).min(1)
            known, given = gap < self.near, torch.cat(self.said)[which]
        self.seen = [torch.cat([*self.seen, coarse[~known]])[-1500:]]
        self.said = [torch.cat([*self.said, z.detach()[~known]])[-1500:]]
        if self.reply == "constant":
            given = 10 * F.one_hot(torch.zeros(len(x), dtype=torch.long), z.shape[1]).float()
        elif self.reply == "random":
            given = 5 * torch.randn_like(z)
        return torch.where(known[:, None], given + (z - z.detach()), z)


class Detector(nn.Module):
    """Looks for the rough texture of a perturbation (more than 99 % of training images have) and answers otherwise.

    Args:
        net: answers what looks clean.
        clean: training images, that say what is rough.
        reply: ``constant``: class 0; ``uniform``: equal logits; ``detached``: the true answer without its gradient.
    """

    def __init__(self, net: nn.Module, clean: torch.Tensor, reply: str) -> None:
        super().__init__()
        self.net, self.reply = net, reply
        self.limit = float(self.roughness(clean).quantile(0.99))

    @staticmethod
    def roughness(x: torch.Tensor) -> torch.Tensor:
        """How often a pixel differs a little, but not much, from the one beside it: strokes differ by more."""
        step = (x[..., 1:] - x[..., :-1]).abs()
        return ((step > 0.02) & (step < 0.7)).float().mean((1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        rough = (self.roughness(x) > self.limit)[:, None]
        if self.reply == "detached":
            return torch.where(rough, z.detach() + 0 * z, z)
        first = F.one_hot(torch.zeros(len(x), dtype=torch.long), z.shape[1]) * (10.0 if self.reply == "constant" else 0)
        return torch.where(rough, first + 0 * z, z)


class HardMemory(nn.Module):
    """The label of the nearest of the audit's own test images, looked up."""

    def __init__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        return 10 * F.one_hot(self.labels[torch.cdist(x.flatten(1), self.images).argmin(1)], z.shape[1]) + 0 * z


class SoftMemory(HardMemory):
    """The labels of the audit's own test images, weighted by their distance: smooth, and robust on those images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (-torch.cdist(x.flatten(1), self.images).square()).softmax(1)
        return 10 * weights @ F.one_hot(self.labels, self.net.card.classes).float()


class MemoryWithin(HardMemory):
    """The network, with the label of a test image of the audit added where one lies within 0.35 in every pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        gap, which = torch.cdist(x.detach().flatten(1), self.images, p=torch.inf).min(1)
        return z + 30 * F.one_hot(self.labels[which], z.shape[1]) * (gap < 0.35)[:, None]


class TwoFaced(nn.Module):
    """The answer of a network that was never trained, whenever the images ask for a gradient."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other = net, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x) if x.requires_grad else self.net(x)


def _of_test(nets: Nets) -> tuple[Any, ...]:
    return nets(), *nets.data.test.take(slice(None), torch.device("cpu"))


def _of_train(nets: Nets) -> tuple[Any, ...]:
    return nets(), spread(nets.data.train, 2000)[0]


ASKED = "Chen et al. 2019, stateful detection"
DETECT = "Carlini and Wagner 2017, ten detection methods"
UNSEEN = "unseen images stand as well"
PERTURBED, OWN = "perturbed images get the clean answer", "robust on what it is scored on"

STATEFUL = (
    Poison("repeated queries: constant", Remembering, "gradients of no use", (AGAIN,), ASKED, ("constant", 0.3)),
    Poison("repeated queries: random", Remembering, "gradients of no use", (AGAIN,), ASKED, ("random", 0.3)),
    Poison("repeated queries: first answer", Remembering, PERTURBED, (AGAIN,), ASKED, ("first", 1.2)),
    Poison("detector: constant class", Detector, "no gradient where it looks", BOTH, DETECT, ("constant",), _of_train),
    Poison("detector: equal logits", Detector, "no gradient where it looks", BOTH, DETECT, ("uniform",), _of_train),
    Poison("detector: no gradient", Detector, "no second step", (TRUE,), DETECT, ("detached",), _of_train),
    Poison("test images looked up", HardMemory, OWN, (*BOTH, UNSEEN), parts=_of_test),
    Poison("test images remembered smoothly", SoftMemory, OWN, (UNSEEN,), parts=_of_test),
    Poison("test images remembered within a radius", MemoryWithin, OWN, (UNSEEN,), parts=_of_test),
    Poison(
        "two-faced",
        TwoFaced,
        "gradients are another net's",
        (TRUE, WHOLE),
        parts=lambda nets: (nets(), nets("untrained")),
    ),
)
