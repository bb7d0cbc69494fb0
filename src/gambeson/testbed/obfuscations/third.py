"""The third library: what an attacker of evaluations would invent next, around an honest network.

Written as the second was (:mod:`gambeson.testbed.obfuscations.second`), from mechanisms rather than from papers: models
that read the loss, the grid of the pixels or the clock, that hide what matters most, or that know the test images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.testbed.entry import (
    Bent,
    Entry,
    Networks,
    Trunk,
    all_of,
    answers,
    spread,
    three,
    with_training,
)
from gambeson.testbed.obfuscations.features import Refitted
from gambeson.testbed.obfuscations.logits import After
from gambeson.testbed.obfuscations.preprocessing import Before


class RandomScale(After):
    """Logits of each image times a number between one and a million, drawn at every call: the answer stays."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return z * 10 ** (6 * torch.rand(len(z), 1, device=z.device))


class CoinFlipped(Before):
    """The gradient of each image is reversed with a probability of 0.48."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, lambda gradient: gradient * (torch.rand(len(gradient), 1, 1, 1) - 0.48).sign())


class BatchMatesGradient(Before):
    """Each image gets the gradient of the next one in the batch; alone it gets its own."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, lambda gradient: gradient.roll(1, 0))


class OffGridSibling(nn.Module):
    """The network's answers; its gradient for images on their grey levels, that of two siblings for all others."""

    def __init__(self, net: nn.Module, others: list[nn.Module], levels: int) -> None:
        super().__init__()
        self.net, self.others, self.levels = net, nn.ModuleList(others), levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, off = self.net(x), x.detach() * self.levels
        foreign = ((off - off.round()).abs() > 1e-2).flatten(1).any(1)[:, None]
        other = sum(member(x.flip(-1)) for member in self.others)
        return torch.where(foreign, z.detach() + other - other.detach(), z)


class Bumpy(nn.Module):
    """Waves of a twentieth in height on each logit, each along its own random direction: the slope is all wave."""

    directions: torch.Tensor

    def __init__(self, net: nn.Module, image: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("directions", torch.randn(image.numel(), classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + 0.05 * torch.sin(300 * x.flatten(1) @ self.directions)


class NarrowKernels(nn.Module):
    """Kernels around the features of training images, so narrow that they vanish; then a detached net decides."""

    known: torch.Tensor
    labels: torch.Tensor

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())
        images, labels = spread(nets.data.train, 2000)
        h = answers(self.trunk, images)
        self.register_buffer("known", h)
        self.register_buffer("labels", F.one_hot(labels, nets.data.num_classes).float())
        self.width = 0.03 * float(torch.cdist(h, h).median())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        kernels = torch.exp(-torch.cdist(h, self.known).square() / (2 * self.width**2))
        return (kernels @ self.labels + 1e-6).log() + self.trunk.head(h).detach()


class BinaryFeatures(Refitted):
    """The last features as signs, passed on with a slope only where they are farther than two deviations out."""

    def change(self, h: torch.Tensor) -> torch.Tensor:
        return h.sign() + (h - h.detach()) * (h.abs() > 2)


class DeadZone(Before):
    """Pixels below 0.14 are black: what lies there has no slope."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x > 0.14)


class Ranked(Before):
    """Each pixel is exchanged for the mean training pixel of the same rank in its image."""

    usual: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor) -> None:
        super().__init__(net)
        self.register_buffer("usual", images.flatten(1).sort(1).values.mean(0))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        ranks = flat.argsort(dim=1, stable=True).argsort(dim=1)
        return self.usual[ranks].view_as(x) + 0 * x


class GraphSees(nn.Module):
    """An adversarially trained network answers wherever a graph is built, the standard one elsewhere."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other = net, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x) if torch.is_grad_enabled() else self.net(x)


def without_strongest(gradient: torch.Tensor) -> torch.Tensor:
    """Set the larger half of a gradient's entries to zero."""
    size = gradient.abs()
    return gradient * (size < size.flatten(1).median(1).values.view(-1, 1, 1, 1))


class StrongestHidden(Before):
    """The half of the pixels with the larger slope has none."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, without_strongest)


class OnManifold(Before):
    """The gradient is projected on the twelve main directions of the training images."""

    axes: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor) -> None:
        super().__init__(net)
        flat = images.flatten(1)
        self.register_buffer("axes", torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:12])

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, lambda g: (g.flatten(1) @ self.axes.T @ self.axes).view_as(g))


class Comparator(After):
    """A steep tanh of how far each logit lies above the middle between the first and the second."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        top = z.topk(2, dim=1).values
        return 3 * torch.tanh(30 * (z - top.mean(1, keepdim=True)))


class ClippedProbabilities(After):
    """Smoothed labels to the letter: log-probabilities, cut off where a class has less than 2 % or more than 90 %."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        p = (3 * z).softmax(1)
        return (p.clamp(0.02, 0.9) + 1e-6 * p.detach()).log()


class SilentIfAgreed(nn.Module):
    """Three networks; where they agree, their class without a gradient, elsewhere their mean."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = torch.stack([member(x) for member in self.members])
        first = each.argmax(2)
        agreed = (first == first[0]).all(0)[:, None]
        mean = each.mean(0)
        return torch.where(agreed, mean.detach() * 3, mean)


class FeatureMemory(nn.Module):
    """The labels of the test images, added by how near an image's coarse copy lies to theirs: smooth everywhere."""

    coarse: torch.Tensor
    labels: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("coarse", F.adaptive_avg_pool2d(images, 4).flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        gaps = torch.cdist(F.adaptive_avg_pool2d(x, 4).flatten(1), self.coarse)
        near = torch.exp(-((gaps / 0.35) ** 4))
        return z + 30 * near @ F.one_hot(self.labels, z.shape[1]).float()


class SlowDrift(nn.Module):
    """With every call the logits are multiplied by 1.3 until, after some tens of calls, no gradient is left."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x) * 1.3 ** min(self.calls, 60)


class Rotated(Before):
    """The gradient comes back turned by a quarter."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, lambda gradient: gradient.rot90(1, (-2, -1)))


def with_siblings(nets: Networks) -> tuple[Any, ...]:
    """Return a network, two siblings, and the number of grey levels above zero."""
    return nets(), [nets("standard 1"), nets("standard 2")], 16 if nets.data.name == "digits" else 255


_ALL = (
    Entry("state", "slow drift of scale", SlowDrift, "early queries have a gradient, later ones none"),
    Entry("randomness", "random scale", RandomScale, "most images have no gradient"),
    Entry("false gradient", "coin-flipped gradient", CoinFlipped, "every other step walks back"),
    Entry(
        "false gradient",
        "bumpy logits",
        Bumpy,
        "the gradient is shattered",
        parts=lambda nets: (nets(), torch.zeros(nets.data.train.shape), nets.data.num_classes),
    ),
    Entry(
        "false gradient",
        "another net where a graph is built",
        GraphSees,
        "every attack is a transfer",
        parts=lambda nets: (nets(), nets("pgd-adversarial")),
    ),
    Entry("false gradient", "strongest pixels hidden", StrongestHidden, "what matters has no gradient"),
    Entry(
        "false gradient", "gradient on the manifold", OnManifold, "the gradient has few directions", parts=with_training
    ),
    Entry("false gradient", "turned gradient", Rotated, "the gradient is of another pixel"),
    Entry("batch", "gradient of a batch-mate", BatchMatesGradient, "gradients of other images"),
    Entry(
        "detection",
        "siblings off the grid",
        OffGridSibling,
        "gradients are true on clean images alone",
        parts=with_siblings,
    ),
    Entry(
        "features",
        "narrow kernels",
        NarrowKernels,
        "the gradient vanishes",
        source="Goodfellow et al. 2015",
        parts=all_of,
    ),
    Entry(
        "features",
        "binary features",
        BinaryFeatures,
        "few features have a slope",
        source="Galloway et al. 2018; Lin et al. 2019",
        parts=all_of,
    ),
    Entry("preprocessing", "dead zone", DeadZone, "dark pixels have no gradient"),
    Entry("preprocessing", "ranked pixels", Ranked, "no gradient at all", parts=with_training),
    Entry("logits", "comparator", Comparator, "the gradient saturates"),
    Entry("logits", "clipped probabilities", ClippedProbabilities, "sure images have no gradient"),
    Entry(
        "logits",
        "silent where members agree",
        SilentIfAgreed,
        "no gradient where three agree",
        source="Sen et al. 2020",
        parts=three,
    ),
    Entry(
        "memorization",
        "coarse test images remembered",
        FeatureMemory,
        "robust on what it is scored on",
        parts=lambda nets: (nets(), *nets.data.test.take(slice(None))),
    ),
)
THIRD = tuple(replace(entry, library="third") for entry in _ALL)
