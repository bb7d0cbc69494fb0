"""Honest models that look suspicious: quantised, random or unusual ones, which an audit must not accuse."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.models.pixel_model import Normalize
from gambeson.testbed.entry import Entry, Library, Networks, Trunk, all_of, answers, spread
from gambeson.testbed.obfuscations.second import with_shape


class EightBits(nn.Module):
    """Activations in 256 levels, as an integer runtime computes them, with the gradient passed straight through."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._rounded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return self.net(x)

    @staticmethod
    def _rounded(module: nn.Module, inputs: Any, h: torch.Tensor) -> torch.Tensor:
        step = 8.0 / 255  # fixed when a network is quantised: the range of its activations
        return h + ((h / step).round().clamp(0, 255) * step - h).detach()


class SoftForest(nn.Module):
    """Sixteen trees of depth four with soft gates on the last features; leaves hold the classes seen in training."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())
        images, labels = spread(nets.data.train, 3000)
        h = answers(self.trunk, images)
        self.register_buffer("gates", torch.randn(h.shape[1], 16 * 15) / h.std() / h.shape[1] ** 0.5)
        self.register_buffer("middle", (h @ self.gates).median(0).values)
        reached = self._leaves(h)
        counts = reached.flatten(1).T @ F.one_hot(labels, nets.data.num_classes).float() + 0.1
        self.register_buffer("leaves", (counts / counts.sum(1, keepdim=True)).log())

    gates: torch.Tensor
    middle: torch.Tensor
    leaves: torch.Tensor

    def _leaves(self, h: torch.Tensor) -> torch.Tensor:
        right = torch.sigmoid(6 * (h @ self.gates - self.middle)).view(-1, 16, 15)
        reached, first = torch.ones_like(right[..., :1]), 0
        for depth in range(4):
            gate = right[..., first : first + 2**depth]
            reached = torch.stack([reached * (1 - gate), reached * gate], -1).flatten(2)
            first += 2**depth
        return reached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return self._leaves(self.trunk(x)).flatten(1) @ self.leaves


class Kernels(nn.Module):
    """A smooth vote of the training images, by the distance of their last features: as wide as these lie apart."""

    known: torch.Tensor
    labels: torch.Tensor

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())
        images, labels = spread(nets.data.train, 1000)
        h = answers(self.trunk, images)
        self.register_buffer("known", h)
        self.register_buffer("labels", F.one_hot(labels, nets.data.num_classes).float())
        self.width = float(torch.cdist(h, h).median()) / 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        gaps = torch.cdist(self.trunk(x), self.known)
        return ((-gaps.square() / (2 * self.width**2)).softmax(1) @ self.labels + 1e-3).log()


class Smoothed(nn.Module):
    """The mean logits of a few noisy copies; ``fixed``: with the same noise at every call."""

    noise: torch.Tensor

    def __init__(self, net: nn.Module, image: torch.Tensor, copies: int, fixed: bool) -> None:
        super().__init__()
        self.net, self.fixed = net, fixed
        self.register_buffer("noise", torch.randn(copies, *image.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        noise = self.noise if self.fixed else torch.randn_like(self.noise)
        return torch.stack([self.net(x + 0.1 * each) for each in noise]).mean(0)


class ToColour(nn.Module):
    """Grey images as three equal channels, for a network of colour images."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.normalize = Normalize(3 * net.card.mean, 3 * net.card.std)
        self.body = net.body
        first: Any = net.body.conv1
        first.in_channels = 3
        first.weight = nn.Parameter(first.weight.detach() * torch.tensor([0.3, 0.6, 0.1]).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, 1 or 3, H, W)."""
        return self.body(self.normalize(x.expand(-1, 3, -1, -1)))


class InPrecision(nn.Module):
    """The network computed in another floating-point type."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = copy.deepcopy(net).to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return self.net(x.to(self.dtype)).to(x.dtype)


class LogProbabilities(nn.Module):
    """Log-probabilities in the place of logits, at a temperature of four."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of images (N, C, H, W)."""
        return (self.net(x) / 4).log_softmax(1)


def itself(net: nn.Module) -> nn.Module:
    """The network itself."""
    return net


def _in(library: Library, *entries: Entry) -> tuple[Entry, ...]:
    return tuple(replace(entry, library=library) for entry in entries)


SUSPICIOUS = (
    *_in(
        "second",
        Entry("honest", "eight-bit activations", EightBits, "Activations in 256 levels, gradient straight through."),
        Entry("honest", "soft forest", SoftForest, "Soft decision trees on the last features.", parts=all_of),
        Entry(
            "honest",
            "smoothed by fixed noise",
            Smoothed,
            "The mean logits under eight fixed noises.",
            settings=(8, True),
            parts=with_shape,
        ),
        Entry("honest", "grey to colour", ToColour, "A network of colour images on grey ones."),
        Entry(
            "honest",
            "batch-norm",
            itself,
            "LeNet-5 with BatchNorm, in evaluation mode.",
            parts=lambda nets: (nets("batch-norm"),),
        ),
    ),
    *_in(
        "third",
        Entry("honest", "smooth kernels", Kernels, "A smooth vote of training images by their features.", parts=all_of),
        Entry(
            "honest",
            "averaged noise",
            Smoothed,
            "The mean logits under four noises, drawn at every call.",
            settings=(4, False),
            parts=with_shape,
        ),
        Entry("honest", "bfloat16", InPrecision, "LeNet-5 computed in bfloat16.", settings=(torch.bfloat16,)),
        Entry("honest", "float64", InPrecision, "LeNet-5 computed in float64.", settings=(torch.float64,)),
        Entry("honest", "log-probabilities", LogProbabilities, "Log-probabilities at a temperature of four."),
        Entry(
            "honest",
            "Lipschitz",
            itself,
            "Two layers of spectral norm one, logits times 20.",
            source="Miyato et al. 2018; Tsuzuku et al. 2018",
            parts=lambda nets: (nets("Lipschitz"),),
        ),
    ),
)
"""Honest models, written as the second and third libraries were."""
