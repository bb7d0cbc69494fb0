"""What answers by the batch: an image's answer depends on what stands beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.auditing.poisoned.poison import Nets, Poison, answers, spread

MATES = ("train-mode BatchNorm",)


class BatchCentred(nn.Module):
    """The mean image of the batch exchanged for that of the training images: what all share is taken out."""

    def __init__(self, net: nn.Module, mean: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x if len(x) == 1 else x - x.mean(0, keepdim=True) + self.mean)


class LogitsCentred(nn.Module):
    """The batch's mean logits exchanged for those of the training images: no class can gain on all images at once."""

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

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            for module in self.net.modules():
                module.training = True
        return self.net(x)


def _mean_image(nets: Nets) -> tuple[Any, ...]:
    net, images = nets(), spread(nets.data.train, 2000)[0]
    return net, images.mean(0, keepdim=True)


def _mean_logits(nets: Nets) -> tuple[Any, ...]:
    net, images = nets(), spread(nets.data.train, 2000)[0]
    return net, answers(net, images).mean(0, keepdim=True)


C2, E2 = "RobustBench/robustbench#7: flips with the batch size (C2)", "bethgelab/foolbox#74 (E2)"
NONE = "no pattern works"

BATCHES = (
    Poison("batch's mean image exchanged", BatchCentred, NONE, MATES, C2, parts=_mean_image),
    Poison("batch's mean logits exchanged", LogitsCentred, NONE, MATES, C2, parts=_mean_logits),
    Poison(
        "BatchNorm stuck in training",
        StuckInTraining,
        "answers by batch-mates",
        MATES,
        E2,
        parts=lambda nets: (nets("batch-norm"),),
    ),
)
