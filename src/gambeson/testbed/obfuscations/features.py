"""Models obfuscated in their features: saturated, shattered or detached; and by single-step training."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.testbed.entry import Entry, Networks, Trunk, all_of, answers, fitted_head, spread


class StoppedFeatures(nn.Module):
    """The last features cut off from the graph."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        return self.trunk.head(h.detach() + 0 * h)


class HalfStopped(StoppedFeatures):
    """Three quarters of the last features cut off from the graph: a gradient is left, but of another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        kept = torch.arange(h.shape[1], device=h.device) % 4 == 0
        return self.trunk.head(torch.where(kept, h, h.detach()))


class Refitted(nn.Module):
    """A network whose standardised last features are changed, with a last layer fitted to the change."""

    head: nn.Module

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())
        h = answers(self.trunk, spread(nets.data.train, 2000)[0])
        self.register_buffer("mean", h.mean(0))
        self.register_buffer("sd", h.std(0) + 1e-3)
        self.head = nn.Identity()
        self.head = fitted_head(self, nets.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.change((self.trunk(x) - self.mean) / self.sd))

    def change(self, h: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Sigmoid(Refitted):
    """A sigmoid a thousand times too steep before the last layer: 0 or 1, and no slope."""

    def change(self, h: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(1e3 * h)


class Tanh(Refitted):
    """A tanh fifty times too steep before the last layer."""

    def change(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(50 * h)


class DeepSquashing(Refitted):
    """A hundred layers of tanh, each with a gain of 1.5: features are pulled to two points and the slope vanishes."""

    def change(self, h: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            h = torch.tanh(1.5 * h)
        return h


class Shattered(nn.Module):
    """A sine of high frequency and small height on the last features: values stay, the slope is all sine."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        return self.trunk.head(h + 0.02 * torch.sin(1e4 * h))


def single_step(net: nn.Module) -> nn.Module:
    """LeNet-5 trained on clean images and on single steps of 0.4: right on those, and broken by many small ones."""
    return net


def winners(net: nn.Module) -> nn.Module:
    """LeNet-5 in which a tenth of each layer's activations wins and the others are zero: jumps everywhere."""
    return net


OBFUSCATED = "Athalye et al. 2018"

FEATURES = (
    Entry("features", "stopped features", StoppedFeatures, "no gradient at all", "fra31/auto-attack#43", parts=all_of),
    Entry("false gradient", "three quarters stopped", HalfStopped, "the gradient is of another function", parts=all_of),
    Entry("features", "steep sigmoid", Sigmoid, "the gradient saturates", OBFUSCATED, parts=all_of),
    Entry("features", "steep tanh", Tanh, "the gradient saturates", OBFUSCATED, parts=all_of),
    Entry(
        "features", "a hundred tanh", DeepSquashing, "the gradient vanishes", f"{OBFUSCATED}, section 4.3", parts=all_of
    ),
    Entry("features", "shattered features", Shattered, "the gradient is shattered", OBFUSCATED, parts=all_of),
    Entry(
        "features",
        "single-step training",
        single_step,
        "FGSM finds nothing",
        "Tramèr et al. 2018, section 3.3; Wong et al. 2020",
        parts=lambda nets: (nets("single-step"),),
    ),
    Entry(
        "features",
        "k winners take all",
        winners,
        "the gradient jumps",
        "Xiao et al. 2020; taken apart by Tramèr et al. 2020",
        parts=lambda nets: (nets("k-winners"),),
    ),
)
