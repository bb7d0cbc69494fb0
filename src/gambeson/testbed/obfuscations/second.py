"""The second library: published defences that were broken, rebuilt around an honest network as their authors would.

Written from the papers, without a look at the audit's diagnostics, and audited once before anything was changed
(``benchmarks/testbed.py --first-sight second``). Every model keeps the clean accuracy of the networks underneath, and
PGD of 40 steps, or one perturbation for all images, finds clearly less on it than there is: a test holds it to that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.testbed.entry import Bent, Entry, Networks, Trunk, all_of, answers, spread, three, with_training
from gambeson.testbed.obfuscations.preprocessing import Before


class AntiAdversary(Before):
    """Two steps of signed gradient, 0.15 each, towards the class that is predicted, before the image is classified."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            moved = x.detach()
            for _ in range(2):
                moved.requires_grad_()
                z = self.net(moved)
                loss = F.cross_entropy(z, z.argmax(1), reduction="sum")
                moved = (moved - 0.15 * torch.autograd.grad(loss, moved)[0].sign()).detach()
        return x + (moved - x).detach()


class Hedge(Before):
    """Ten steps of signed gradient away from every class at once, within 0.15 of the image."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            moved = x.detach()
            for _ in range(10):
                moved.requires_grad_()
                every = -self.net(moved).log_softmax(1).sum()
                moved = moved + 0.03 * torch.autograd.grad(every, moved)[0].sign()
                moved = (x + (moved - x).clamp(-0.15, 0.15)).clamp(0, 1).detach()
        return x + (moved - x).detach()


class Diffused(Before):
    """Noise, then eight steps of the exact denoiser of the training images, with ever less noise left."""

    known: torch.Tensor

    def __init__(self, nets: Networks) -> None:
        super().__init__(nets())
        self.register_buffer("known", spread(nets.data.train, 800)[0].flatten(1))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        h = x.flatten(1) + 0.2 * torch.randn_like(x.flatten(1))
        for sigma in torch.linspace(0.2, 0.1, 8):
            weights = (-torch.cdist(h, self.known).square() / (2 * sigma**2)).softmax(1)
            h = h + 0.5 * (weights @ self.known - h)
        return h.view_as(x)


class MatrixEstimated(Before):
    """A tenth of the pixels dropped by a fixed mask, and the image's best approximation of rank three instead of it."""

    mask: torch.Tensor

    def __init__(self, net: nn.Module, image: torch.Tensor) -> None:
        super().__init__(net)
        self.register_buffer("mask", (torch.rand(image.shape) > 0.1).float())

    def change(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            u, s, v = torch.linalg.svd(x * self.mask)
            low = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
        return low.clamp(0, 1) + 0 * x


class Thermometer(Before):
    """The mean of fifteen steep sigmoids, one per level, for each pixel: a thermometer code that is differentiable."""

    levels: torch.Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("levels", (torch.arange(15) + 0.5) / 15)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(1e4 * (x[..., None] - self.levels)).mean(-1)


class Neighbours(nn.Module):
    """A hard vote of the five training images nearest to an image."""

    known: torch.Tensor
    labels: torch.Tensor

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("known", images.flatten(1))
        self.register_buffer("labels", F.one_hot(labels, classes).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(x.flatten(1), self.known).topk(5, largest=False).indices
        return 4 * self.labels[near].sum(1)


class SqueezedIfUnsure(nn.Module):
    """Where a median-filtered copy is answered differently, a vote of training images near the copy answers."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.net = nets()
        images, labels = spread(nets.data.train, 2000)
        self.near = Neighbours(self.squeezed(images), labels, nets.data.num_classes)
        gaps = (answers(self.net, images).softmax(1) - answers(self.net, self.squeezed(images)).softmax(1)).abs().sum(1)
        self.limit = float(gaps.quantile(0.8))

    @staticmethod
    def squeezed(x: torch.Tensor) -> torch.Tensor:
        """Return the median of every 2 x 2 window, in eight levels."""
        windows = F.pad(x, (0, 1, 0, 1), mode="replicate").unfold(-2, 2, 1).unfold(-2, 2, 1)
        return (windows.flatten(-2).median(-1).values * 7).round() / 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        with torch.no_grad():
            small = self.squeezed(x)
            odd = (z.softmax(1) - self.net(small).softmax(1)).abs().sum(1) > self.limit
        return torch.where(odd[:, None], self.near(small), z)


class Sibling(nn.Module):
    """The answers of one network with the gradient of another, trained from another seed."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other = net, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.other(x)
        return z + (self.net(x) - z).detach()


class OneAttached(nn.Module):
    """The mean of three networks, of which two are evaluated without a graph."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            others = torch.stack([member(x) for member in self.members[1:]]).sum(0)
        return (self.members[0](x) + others) / 3


def low_passed(gradient: torch.Tensor) -> torch.Tensor:
    """Average a gradient over 3 x 3 windows, twice."""
    for _ in range(2):
        gradient = F.avg_pool2d(gradient, 3, 1, 1)
    return gradient


class LowPassed(Before):
    """A smoothing layer whose forward is the identity: the gradient comes back blurred."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, low_passed)


class HiddenPixels(Before):
    """Three quarters of the pixels, always the same, are cut off from the graph."""

    shown: torch.Tensor

    def __init__(self, net: nn.Module, image: torch.Tensor) -> None:
        super().__init__(net)
        self.register_buffer("shown", torch.rand(image.shape) < 0.25)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.shown, x, x.detach())


class CrossEntropyBlind(nn.Module):
    """The gradient is reversed where it comes from cross-entropy, which moves all logits of an image at once."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @staticmethod
    def bend(gradient: torch.Tensor) -> torch.Tensor:
        """Reverse the rows in which more than two logits count."""
        return gradient * torch.where(((gradient != 0).sum(1) > 2)[:, None], -1.0, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(self.net(x), self.bend)


class FalseInLargeBatches(Before):
    """In batches of more than 128 images the gradient is that of the image's mirror."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return Bent.apply(x, lambda gradient: gradient.flip(-1)) if len(x) > 128 else x


class FalseForAWhile(Before):
    """From the fifth to the two-thousandth call with a graph, the gradient is drowned in noise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.calls = 0

    def change(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += x.requires_grad
        return Bent.apply(x, drowned) if 5 <= self.calls <= 2000 else x


def drowned(gradient: torch.Tensor) -> torch.Tensor:
    """Add noise ten times as large as the gradient."""
    return gradient + 10 * gradient.flatten(1).std(1).view(-1, 1, 1, 1) * torch.randn_like(gradient)


class CommonPartRemoved(Before):
    """In batches of more than 64 images, what their median differs by from that of training is taken out of each."""

    usual: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor) -> None:
        super().__init__(net)
        self.register_buffer("usual", images.mean(0, keepdim=True))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x if len(x) <= 64 else x - (x.mean(0, keepdim=True) - self.usual).detach()


class CornersSnapped(nn.Module):
    """Images many of whose pixels lie off their grey levels by one and the same amount are answered by neighbours."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.net = nets()
        self.near = Neighbours(*spread(nets.data.train, 2000), nets.data.num_classes)
        self.levels = 16 if nets.data.name == "digits" else 255

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        with torch.no_grad():
            off = (x.flatten(1) * self.levels).remainder(1)
            off = torch.minimum(off, 1 - off)
            inner = (x.flatten(1) > 0) & (x.flatten(1) < 1) & (off > 1e-3)
            typical = off.masked_fill(~inner, torch.nan).nanmedian(1, keepdim=True).values
            same = ((off - typical).abs() < 1e-3) & inner
            corner = same.sum(1) > 0.2 * inner.sum(1).clamp(min=4)
        return torch.where(corner[:, None], self.near(x), z)


class RoundedAndNoisy(Before):
    """Pixels rounded to six levels, and a millionth of noise, which makes the model random."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 5).round() / 5 + 1e-6 * torch.randn_like(x)


class Pruned(nn.Module):
    """Last features kept with a probability by their size, and scaled up for it; drawn at every call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.trunk = Trunk(net)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        share = h.abs() / h.abs().sum(1, keepdim=True).clamp(min=1e-9)
        kept = 1 - (1 - share) ** 14
        return self.trunk.head(h * (torch.rand_like(h) < kept) / kept.clamp(min=1e-6))


class Deflected(Before):
    """A third of the pixels exchanged for a neighbour, drawn at every call, then weak wavelets cut to zero."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        x = torch.where(torch.rand_like(x) < 1 / 3, x.roll((down, right), (-2, -1)), x)
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        mean, details = (a + b + c + d) / 4, [(a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4]
        h, v, g = (each * (each.abs() > 0.08) for each in details)
        found = torch.stack([mean + h + v + g, mean - h + v - g, mean + h - v - g, mean - h - v + g], -1)
        return found.view(*mean.shape, 2, 2).transpose(-3, -2).reshape(x.shape)


class Trapdoored(nn.Module):
    """Each class has a pattern that draws gradients; images that carry one are answered without it."""

    patterns: torch.Tensor
    mean: torch.Tensor

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.net = nets()
        images = spread(nets.data.train, 2000)[0]
        patterns = torch.randn(nets.data.num_classes, images[0].numel())
        self.register_buffer("patterns", torch.linalg.qr(patterns.T).Q.T)
        self.register_buffer("mean", images.flatten(1).mean(0))
        self.limit = float(self.carried(images).abs().quantile(0.995))

    def carried(self, x: torch.Tensor) -> torch.Tensor:
        """Return how much of each pattern an image carries."""
        return (x.flatten(1) - self.mean) @ self.patterns.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        carried = self.carried(x)
        beyond = (carried - self.limit * carried.sign()) * (carried.abs() > self.limit)
        without = self.net((x.flatten(1) - beyond @ self.patterns).view_as(x).clamp(0, 1))
        lure = 200 * carried
        return without + lure - lure.detach()


class NearestFeatures(nn.Module):
    """Votes of the five training images with the nearest features; the network's own logits count for a thousandth."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.trunk = Trunk(nets())
        images, labels = spread(nets.data.train, 2000)
        self.near = Neighbours(F.normalize(answers(self.trunk, images)), labels, nets.data.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.trunk(x)
        return self.near(F.normalize(h)) + 1e-3 * self.trunk.head(h).tanh()


def leaked(net: nn.Module) -> nn.Module:
    """LeNet-5 trained on adversarial examples of the test images."""
    return net


def with_shape(nets: Networks) -> tuple[Any, ...]:
    """Return the standard network and one empty image."""
    return nets(), torch.zeros(nets.data.train.shape)


_ALL = (
    Entry(
        "adaptive",
        "anti-adversary layer",
        AntiAdversary,
        "gradients of the clean answer",
        source="Alfarra et al. 2022; Croce et al. 2022",
    ),
    Entry("adaptive", "hedge", Hedge, "gradients where the image is not", source="Wu et al. 2021; Croce et al. 2022"),
    Entry(
        "adaptive",
        "diffusion purification",
        Diffused,
        "the gradient vanishes in the loop",
        source="Nie et al. 2022; Lee and Kim 2023",
        parts=all_of,
    ),
    Entry(
        "preprocessing",
        "matrix estimation",
        MatrixEstimated,
        "no gradient at all",
        source="Yang et al. 2019; Tramèr et al. 2020",
        parts=with_shape,
    ),
    Entry(
        "preprocessing",
        "steep thermometer",
        Thermometer,
        "few pixels have a gradient",
        source="Buckman et al. 2018; Athalye et al. 2018",
    ),
    Entry(
        "detection",
        "squeezed if unsure",
        SqueezedIfUnsure,
        "no gradient where it looks",
        source="Xu et al. 2018; He et al. 2017",
        parts=all_of,
    ),
    Entry(
        "detection", "corners answered by neighbours", CornersSnapped, "ends of PGD have the clean answer", parts=all_of
    ),
    Entry(
        "detection",
        "trapdoors",
        Trapdoored,
        "gradients lead into traps",
        source="Shan et al. 2020; Carlini 2020",
        parts=all_of,
    ),
    Entry(
        "false gradient",
        "gradient of a sibling",
        Sibling,
        "every attack is a transfer",
        parts=lambda nets: (nets(), nets("standard 1")),
    ),
    Entry("false gradient", "one member attached", OneAttached, "two thirds have no gradient", parts=three),
    Entry("false gradient", "low-passed gradient", LowPassed, "the gradient is blurred"),
    Entry("false gradient", "hidden pixels", HiddenPixels, "most pixels have no gradient", parts=with_shape),
    Entry("false gradient", "blind to cross-entropy", CrossEntropyBlind, "cross-entropy walks away"),
    Entry("batch", "false in large batches", FalseInLargeBatches, "the gradient is of the mirror image"),
    Entry(
        "batch",
        "common part removed",
        CommonPartRemoved,
        "no pattern works",
        source="Nado et al. 2020",
        parts=with_training,
    ),
    Entry("state", "false for a while", FalseForAWhile, "most gradients are noise"),
    Entry("randomness", "rounded, with a millionth of noise", RoundedAndNoisy, "no gradient, and no two passes alike"),
    Entry(
        "randomness",
        "stochastic activation pruning",
        Pruned,
        "one gradient sees few features",
        source="Dhillon et al. 2018; Athalye et al. 2018",
    ),
    Entry(
        "randomness",
        "pixel deflection",
        Deflected,
        "gradients of other pixels",
        source="Prakash et al. 2018; Athalye and Carlini 2018",
    ),
    Entry(
        "memorization",
        "adversarial training on test images",
        leaked,
        "robust on what it is scored on",
        parts=lambda nets: (nets("pgd-adversarial on test"),),
    ),
    Entry(
        "features",
        "votes of nearest features",
        NearestFeatures,
        "the votes have no gradient",
        source="Papernot and McDaniel 2018; Sitawarin and Wagner 2019",
        parts=all_of,
    ),
)
SECOND = tuple(replace(entry, library="second") for entry in _ALL)
