"""Models whose output depends on more than the image: earlier queries, the batch, the caller, or the test set."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.testbed.entry import Entry, Networks, answers, spread, with_training


def _coarse(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 7).flatten(1)


class Remembering(nn.Module):
    """Keeps a coarse copy of what it was asked; an image close to one of those is a repeated query.

    Args:
        net: the network for new images.
        reply: for repeated queries, ``constant``: class 0; ``random``: random logits; ``first``: the output for the
            first of them, with the gradient of the network.
        near: largest Euclidean distance between the coarse copies, 7 x 7, of repeated queries.
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
        net: the network for images that look clean.
        clean: training images, which define the threshold.
        reply: for detected images, ``constant``: class 0; ``uniform``: equal logits; ``detached``: the true output
            without gradient.
    """

    def __init__(self, net: nn.Module, clean: torch.Tensor, reply: str) -> None:
        super().__init__()
        self.net, self.reply = net, reply
        self.limit = float(self.roughness(clean).quantile(0.99))

    @staticmethod
    def roughness(x: torch.Tensor) -> torch.Tensor:
        """Share of neighbouring pixels with a small but non-zero difference; those of strokes are larger."""
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

    net: Any
    images: torch.Tensor
    labels: torch.Tensor

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


def _of_test(nets: Networks) -> tuple[Any, ...]:
    return nets(), *nets.data.test.take(slice(None), torch.device("cpu"))


class BatchCentred(nn.Module):
    """The mean image of the batch exchanged for that of the training images: what all share is taken out."""

    mean: torch.Tensor

    def __init__(self, net: nn.Module, mean: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x if len(x) == 1 else x - x.mean(0, keepdim=True) + self.mean)


class LogitsCentred(nn.Module):
    """The batch's mean logits exchanged for those of the training images: no class can gain on all images at once."""

    mean: torch.Tensor

    def __init__(self, net: nn.Module, mean: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        return z if len(x) == 1 else z - z.mean(0, keepdim=True) + self.mean


class StuckInTraining(nn.Module):
    """BatchNorms that cannot be brought out of training mode: a batch's own statistics, and a state that moves."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            for module in self.net.modules():
                module.training = True
        return self.net(x)


def _mean_image(nets: Networks) -> tuple[Any, ...]:
    net, images = nets(), spread(nets.data.train, 2000)[0]
    return net, images.mean(0, keepdim=True)


def _mean_logits(nets: Networks) -> tuple[Any, ...]:
    net, images = nets(), spread(nets.data.train, 2000)[0]
    return net, answers(net, images).mean(0, keepdim=True)


ASKED = "Chen et al. 2019, stateful detection"
DETECT = "Carlini and Wagner 2017, ten detection methods"
PERTURBED, OWN = "perturbed images get the clean answer", "robust on what it is scored on"
BATCH_SIZE, TRAIN_MODE = "RobustBench/robustbench#7: flips with the batch size", "bethgelab/foolbox#74"
NONE = "no pattern works"

CONTEXT = (
    Entry("state", "repeated queries: constant", Remembering, "gradients of no use", ASKED, ("constant", 0.3)),
    Entry("state", "repeated queries: random", Remembering, "gradients of no use", ASKED, ("random", 0.3)),
    Entry("state", "repeated queries: first answer", Remembering, PERTURBED, ASKED, ("first", 1.2)),
    Entry(
        "detection",
        "detector: constant class",
        Detector,
        "no gradient where it looks",
        DETECT,
        ("constant",),
        with_training,
    ),
    Entry(
        "detection",
        "detector: equal logits",
        Detector,
        "no gradient where it looks",
        DETECT,
        ("uniform",),
        with_training,
    ),
    Entry("detection", "detector: no gradient", Detector, "no second step", DETECT, ("detached",), with_training),
    Entry("memorization", "test images looked up", HardMemory, OWN, parts=_of_test),
    Entry("memorization", "test images remembered smoothly", SoftMemory, OWN, parts=_of_test),
    Entry("memorization", "test images remembered within a radius", MemoryWithin, OWN, parts=_of_test),
    Entry(
        "false gradient",
        "two-faced",
        TwoFaced,
        "gradients are another net's",
        parts=lambda nets: (nets(), nets("untrained")),
    ),
    Entry("batch", "batch's mean image exchanged", BatchCentred, NONE, BATCH_SIZE, parts=_mean_image),
    Entry("batch", "batch's mean logits exchanged", LogitsCentred, NONE, BATCH_SIZE, parts=_mean_logits),
    Entry(
        "batch",
        "BatchNorm stuck in training",
        StuckInTraining,
        "answers by batch-mates",
        TRAIN_MODE,
        parts=lambda nets: (nets("batch-norm"),),
    ),
)
