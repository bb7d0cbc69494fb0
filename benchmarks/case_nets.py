"""Networks of the case studies, rebuilt from the shapes of their weights and what their packages say of the input."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn


class Shifted(nn.Module):
    """Pixels in [0, 1] less a mean, over a deviation: the packages do this outside the network."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's input."""
        return (pixels - self.mean) / self.std


def digit_recognizer() -> nn.Module:
    """digit-recognizer-py 0.1.0: three 3 x 3 convolutions (32, 64 and 128 maps), each pooled, linear 256 and 10."""
    widths = (1, 32, 64, 128)
    maps: list[nn.Module] = []
    for before, after in pairwise(widths):
        maps += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    parts = {
        "input": Shifted(0.1307, 0.3081),
        "conv_layers": nn.Sequential(*maps),
        "flat": nn.Flatten(),
        "fc_layers": nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10)),
    }
    return nn.Sequential(OrderedDict(parts))


def public_lenet5() -> nn.Module:
    """LeNet5 of advertorch 0.2.3: two 3 x 3 convolutions (32 and 64 maps), each pooled, linear 200 and 10; pixels."""
    parts = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flat": nn.Flatten(),
        "linear1": nn.Linear(7 * 7 * 64, 200),
        "relu3": nn.ReLU(),
        "linear2": nn.Linear(200, 10),
    }
    return nn.Sequential(OrderedDict(parts))
