"""Models obfuscated in their logits: the loss saturates, or its gradient is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gambeson.testbed.entry import Entry, three


class After(nn.Module):
    """A network followed by a function of its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.net(x))

    def change(self, z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Scaled(After):
    """Logits times a constant: beyond a factor of a hundred the softmax is one-hot and its gradient zero."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__(net)
        self.factor = factor

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return z * self.factor


class FinalReLU(After):
    """A ReLU after the last layer: wrong classes have a logit of zero and no slope."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return z.relu()


class LateReLU(After):
    """A ReLU on how far a logit lies above the third: all but two classes have no slope, one has where it is sure."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        top = z.topk(2, dim=1).values
        return (z - top[:, 1:].detach()).relu()


class LeftSoftmax(After):
    """Probabilities, scaled so that they do not sum to 1: the softmax is taken twice."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return 10 * z.softmax(1)


class Rounded(After):
    """Log-probabilities rounded to one decimal: a staircase without slope."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return (z.log_softmax(1) * 10).round() / 10


class HalfPrecision(After):
    """Large logits in float16, kept from overflow by taking off the largest and cutting at the type's least value."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        moved = (z - z.amax(1, keepdim=True)) * 1e4
        return moved.clamp(min=-65504).half().float()


class Shifted(After):
    """A constant of 2^22 added to all logits, where float32 has steps of a half: what is left of them are halves."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return z + 2.0**22


class FixedMargin(After):
    """Logits divided by their own margin: first and second are always one apart, and their difference has no slope."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        top = z.topk(2, dim=1).values
        return z / (top[:, :1] - top[:, 1:] + 1e-6)


class HardLabel(After):
    """The predicted class alone, as a one-hot row."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return 5 * nn.functional.one_hot(z.argmax(1), z.shape[1]).movedim(-1, 1) + 0 * z


class BorrowedMargins(nn.Module):
    """The answers of one network with the logits of another; where they differ, the answer stands just above them."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other = net, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer = self.net(x).argmax(1, keepdim=True)
        z = self.other(x)
        top, other = z.max(1, keepdim=True)
        above = top + 1 / (1 + top - z.gather(1, answer))
        return torch.where(other == answer, z, z.scatter(1, answer, above))


class ThinLayer(nn.Module):
    """Borrowed margins that fall to zero where the answer changes, but only within a thin layer there."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.borrowed = net, BorrowedMargins(net, other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            best = self.net(x).topk(2, 1)
            near = (20 * (best.values[:, :1] - best.values[:, 1:])).clamp(max=1)
        z, answer = self.borrowed(x), best.indices[:, :1]
        second = z.scatter(1, answer, -torch.inf).amax(1, keepdim=True)
        return z.scatter(1, answer, second + (z.gather(1, answer) - second) * near)


class Constant(After):
    """The same class for every image."""

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return z * 0


class _Backward(torch.autograd.Function):
    """The identity, with a modified gradient."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.kind = kind
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        other = -gradient if ctx.kind == "reversed" else torch.randn_like(gradient) * gradient.abs().mean()
        return other, None


class FalseGradient(After):
    """True values, and a gradient that is reversed or drawn at random."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__(net)
        self.kind = kind

    def change(self, z: torch.Tensor) -> torch.Tensor:
        return _Backward.apply(z, self.kind)


class MaskedEnsemble(nn.Module):
    """Three members, each with logits times 10,000; the logarithm of their mean probability, held above -60."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        votes = torch.stack([(1e4 * member(x)).softmax(1) for member in self.members])
        return votes.mean(0).clamp(min=1e-26).log()


ROUNDED = "fra31/auto-attack#43, #44"
TIMES = "ryderling/DEEPSEC#3; Carlini and Wagner 2017, section 5"

LOGITS = (
    Entry("logits", "logits x 1e3", Scaled, "PGD on cross-entropy finds nothing", TIMES, (1e3,)),
    Entry("logits", "logits x 1e4", Scaled, "PGD on cross-entropy finds nothing", TIMES, (1e4,)),
    Entry("logits", "logits x 1e6", Scaled, "PGD on cross-entropy finds nothing", TIMES, (1e6,)),
    Entry(
        "logits",
        "distillation, temperature 100",
        Scaled,
        "few images have a gradient",
        "Papernot et al. 2016; taken apart by Carlini and Wagner 2017",
        (100.0,),
    ),
    Entry("logits", "temperature 100", Scaled, "the sign of the gradient stays", settings=(0.01,)),
    Entry("logits", "logits x 1e-42", Scaled, "the gradient underflows", settings=(1e-42,)),
    Entry("logits", "final ReLU", FinalReLU, "wrong classes have no slope"),
    Entry("logits", "ReLU above the second", LateReLU, "only the first class has a slope"),
    Entry("logits", "softmax left in", LeftSoftmax, "sure images have no gradient", "bethgelab/foolbox#108"),
    Entry("logits", "rounded log-probabilities", Rounded, "no gradient at all", ROUNDED),
    Entry(
        "logits",
        "float16 with a guard",
        HalfPrecision,
        "PGD on cross-entropy finds nothing",
        "Harry24k/adversarial-attacks-pytorch#100",
    ),
    Entry("logits", "huge constant added", Shifted, "small changes of the loss are rounded away"),
    Entry("logits", "fixed margin", FixedMargin, "the margin never falls until it flips"),
    Entry("logits", "hard label", HardLabel, "no gradient at all"),
    Entry("false gradient", "reversed gradient", FalseGradient, "every attack walks away", settings=("reversed",)),
    Entry("false gradient", "random gradient", FalseGradient, "every attack walks at random", settings=("random",)),
    Entry("logits", "ensemble of masked members", MaskedEnsemble, "PGD on cross-entropy finds nothing", parts=three),
    Entry(
        "logits",
        "margins of a sibling",
        BorrowedMargins,
        "every attack is a transfer",
        parts=lambda nets: (nets(), nets("standard 1")),
    ),
    Entry("logits", "constant answer", Constant, "no perturbation changes anything"),
)
