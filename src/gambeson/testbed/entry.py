"""Entries of the testbed, their families, and the parts that obfuscated models share."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import seeded
from gambeson.data import Dataset, Split

KINDS = {
    "preprocessing": "the image is transformed without a useful gradient before the network",
    "logits": "the logits are transformed so that the loss saturates or has no gradient",
    "features": "hidden features saturate, shatter or are detached, by construction or by training",
    "false gradient": "the outputs are the network's, the gradient is not",
    "randomness": "outputs are random, so that a single pass or gradient is not meaningful",
    "state": "the output depends on earlier queries",
    "adaptive": "an optimisation or a correction at inference changes the image or the answer",
    "detection": "perturbed images are detected and treated differently",
    "memorization": "the test images themselves are stored in the model",
    "batch": "the output depends on the rest of the batch",
    "honest": "not obfuscated",
}
"""The families of models, with descriptions."""


Library = Literal["first", "second", "third"]


@dataclass(frozen=True)
class Networks:
    """Trained networks by name, and the data they were trained on."""

    data: Dataset
    get: Callable[[str], nn.Module]

    def __call__(self, name: str = "standard") -> nn.Module:
        """Return a copy of a trained network, in evaluation mode."""
        return copy.deepcopy(self.get(name)).eval()


def plain(nets: Networks) -> tuple[Any, ...]:
    """Return the standard network, which most models are made of."""
    return (nets(),)


def three(nets: Networks) -> tuple[Any, ...]:
    """Return three networks with different seeds."""
    return ([nets(name) for name in ("standard", "standard 1", "standard 2")],)


def all_of(nets: Networks) -> tuple[Any, ...]:
    """Return the networks with their data, for models fitted to the data."""
    return (nets,)


def with_training(nets: Networks) -> tuple[Any, ...]:
    """Return the standard network and 2,000 training images."""
    return nets(), spread(nets.data.train, 2000)[0]


@dataclass(frozen=True)
class Entry:
    """A model of the testbed: an obfuscated one, which looks more robust than it is, or an honest one."""

    kind: str
    """Its family, one of :data:`KINDS`."""
    name: str
    wrapper: Callable[..., nn.Module]
    """The module around the network; its docstring says what it does."""
    effect: str
    """What a naive evaluation observes, in a few words."""
    source: str = ""
    """The defence it imitates and the work that broke it: paper and section, or a public report."""
    settings: tuple[Any, ...] = ()
    """Further arguments of the wrapper."""
    parts: Callable[[Networks], tuple[Any, ...]] = plain
    """Maps the trained networks to the arguments of the wrapper."""
    held_out: bool = False
    """Whether it was written after the audit's diagnostics, to measure what they miss at first sight."""
    library: Library = "first"
    """``first``: the audit's diagnostics were developed on it, but for the ``held_out`` ones; ``second``, ``third``:
    written without a look at the diagnostics, and audited once before anything was changed."""

    @property
    def honest(self) -> bool:
        """Whether it is honest, so that an audit must trust it."""
        return self.kind == "honest"

    @property
    def how(self) -> str:
        """How it deceives, in one sentence; for an honest model, what it is."""
        if self.honest:
            return self.effect
        first = " ".join((self.wrapper.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")
        return f"{first}; {self.effect}."

    @property
    def file_name(self) -> str:
        """Its name as a file name."""
        return re.sub(r"[^a-z0-9.-]+", "-", self.name.lower()).strip("-")

    def build(self, nets: Networks) -> nn.Module:
        """Build the model, in evaluation mode; deterministic, with a new copy every time."""
        with seeded(0, "testbed", self.name):
            return self.wrapper(*self.parts(nets), *self.settings).eval()

    @property
    def signature(self) -> str:
        """A hash of its code and settings, ignoring docstrings, annotations and formatting."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.wrapper)))
        text = ast.unparse(_Bare().visit(tree)) + str(self.settings)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    """Strips docstrings and annotations from code."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            node.body = [one for one in node.body if not (isinstance(one, ast.AnnAssign) and one.value is None)]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        return node


class Bent(torch.autograd.Function):
    """The identity, with its gradient modified by a function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the same values."""
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the modified gradient."""
        return ctx.bend(gradient), None


class Trunk(nn.Module):
    """A LeNet-5 without its last layer: images (N, C, H, W) to features (N, D)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        body: Any = net.body
        self.head: nn.Module = body.fc3
        body.fc3 = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last features."""
        return self.net(x)


def spread(split: Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spaced images and labels, since a split may be ordered by class."""
    rows = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
    return split.take(rows, torch.device("cpu"))


@torch.no_grad()
def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a deterministic model, in batches."""
    return torch.cat([model(part) for part in images.split(500)])


def fitted_head(features: nn.Module, data: Dataset) -> nn.Linear:
    """Fit a last layer by ridge regression on one-hot targets, for features modified after training."""
    images, labels = spread(data.train, 3000)
    h = answers(features, images).double()
    ones = torch.cat([h, torch.ones(len(h), 1).double()], 1)
    targets = nn.functional.one_hot(labels, data.num_classes).double()
    gram = ones.T @ ones + 1e-4 * len(h) * torch.eye(ones.shape[1]).double()
    weight = torch.linalg.solve(gram, ones.T @ targets) * 10
    head = nn.Linear(h.shape[1], data.num_classes)
    with torch.no_grad():
        head.weight.copy_(weight[:-1].T)
        head.bias.copy_(weight[-1])
    return head
