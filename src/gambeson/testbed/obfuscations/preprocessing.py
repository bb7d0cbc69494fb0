"""Models obfuscated by preprocessing: step functions without gradient, and purification loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.testbed.entry import Entry, Networks, spread

ROUNDED = "fra31/auto-attack#43, #44: rounded inputs"


class Before(nn.Module):
    """A network behind a transform of its images, with a graph but without a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.change(x))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Quantised(Before):
    """Pixels rounded to a few levels."""

    def __init__(self, net: nn.Module, levels: int) -> None:
        super().__init__(net)
        self.levels = levels

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class Thresholded(Before):
    """Pixels above one half are 1, the others 0."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0.5).float() + 0 * x


class JpegLike(Before):
    """The cosine transform of every 4 x 4 block, rounded to steps of 0.4, and back."""

    cosine: torch.Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        k = torch.arange(4.0)
        rows = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 8) * math.sqrt(0.5)
        rows[0] = 0.5
        self.register_buffer("cosine", torch.kron(rows, rows))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        planes = x.flatten(0, 1)[:, None]
        blocks = self.cosine @ F.unfold(planes, 4, stride=4)
        back = self.cosine.T @ ((blocks / 0.4).round() * 0.4)
        return F.fold(back, x.shape[-2:], 4, stride=4).view_as(x)


class Detached(Before):
    """Images cut off from the graph."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 0 * x


class WrongStraightThrough(Before):
    """Pixels rounded to four levels, and a straight-through gradient with the wrong sign."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * 3).round() / 3 + x).detach() - x


class Looked(Before):
    """Pixels sorted into 16 bins whose values come from a table: the output has no graph at all."""

    edges: torch.Tensor
    table: torch.Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("edges", torch.arange(1, 16) / 16)
        self.register_buffer("table", torch.arange(16) / 15)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[torch.bucketize(x.detach(), self.edges)]


class Rippled(Before):
    """A ripple of a hundredth of the range, and of ten thousand radians, on every pixel: the slope is all ripple."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * torch.sin(1e4 * x)


class Squashed(Before):
    """A loop that pulls every pixel to black or white, twelve times."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = 0.5 + 0.5 * torch.tanh(4 * (x - 0.5)) / math.tanh(2)
        return x


class Purified(Before):
    """A loop that pulls an image to the nearest of 1,500 training images: a Hopfield memory, three rounds of it."""

    memory: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor) -> None:
        super().__init__(net)
        self.register_buffer("memory", images.flatten(1))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        h = x.flatten(1)
        for _ in range(3):
            h = (-8 * torch.cdist(h, self.memory).square()).softmax(1) @ self.memory
        return h.view_as(x)


def _with_memory(nets: Networks) -> tuple[Any, ...]:
    return nets(), spread(nets.data.train, 1500)[0]


BITS = "Xu et al. 2018; taken apart by He et al. 2017"
BPDA = "Athalye et al. 2018, section 4.1"

PREPROCESSING = (
    Entry("preprocessing", "two grey levels", Quantised, "no gradient at all", f"{BITS}; {ROUNDED}", (2,)),
    Entry("preprocessing", "four grey levels", Quantised, "no gradient at all", f"{BITS}; {ROUNDED}", (4,)),
    Entry("preprocessing", "eight grey levels", Quantised, "no gradient at all", f"{BITS}; {ROUNDED}", (8,)),
    Entry(
        "preprocessing", "threshold at one half", Thresholded, "no gradient at all", "Tramèr et al. 2018, appendix B"
    ),
    Entry("preprocessing", "JPEG-like rounding", JpegLike, "no gradient at all", f"Guo et al. 2018; {BPDA}"),
    Entry("preprocessing", "detached input", Detached, "no gradient at all", ROUNDED),
    Entry("false gradient", "wrong straight-through", WrongStraightThrough, "every attack walks away", BPDA),
    Entry("preprocessing", "table of pixel values", Looked, "no graph at all", f"Buckman et al. 2018; {BPDA}"),
    Entry("preprocessing", "rippled pixels", Rippled, "the gradient is shattered", BPDA),
    Entry(
        "preprocessing",
        "squashing loop on pixels",
        Squashed,
        "the gradient vanishes",
        "Athalye et al. 2018, section 4.3",
    ),
    Entry(
        "preprocessing",
        "purifier loop",
        Purified,
        "the gradient vanishes",
        "Samangouei et al. 2018; Athalye et al. 2018, section 4.3",
        parts=_with_memory,
    ),
)
