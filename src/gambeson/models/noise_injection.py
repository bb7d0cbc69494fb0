"""The noise of Parametric Noise Injection and Random Self-Ensemble, where it is put, and averages over passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gambeson.base import UserError, unknown_name
from gambeson.models.resnet import ResNet

if TYPE_CHECKING:
    from torchvision.models import ResNet as TorchvisionResNet
from typing import Annotated, Literal

from pydantic import Field
from torch.nn.utils import parametrize

from gambeson.base import Number
from gambeson.models.members import Average, vote
from gambeson.models.noise import Noise, NoiseModule, standard_normal

_WITH_CONVOLUTION = (
    _BatchNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
"""Layers between a convolution and its activation that belong to the convolution's block."""


def places_of(body: nn.Module, example: torch.Tensor) -> tuple[list[str], list[str]]:
    """Return the default positions of feature noise: modules whose input receives it, and modules whose output does.

    Raises:
        UserError: there is none.
    """
    if isinstance(body, ResNet):
        return [name for name, _ in body.named_modules() if name == "relu1" or name.endswith(".relu2")], []
    from torchvision.models import ResNet as TorchvisionResNet  # takes longer to import than torch itself

    if isinstance(body, TorchvisionResNet):
        return [], _torchvision_places(body)
    after = _after_convolutions(body, example)
    if not after:
        raise UserError(
            f"{type(body).__name__} has no convolution for feature noise to follow: name the modules in `places`, "
            "or choose a network such as resnet20 or lenet"
        )
    return [], after


def layers_of(body: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Return the names of every layer of these kinds, in order.

    Raises:
        UserError: there is none.
    """
    names = [name for name, module in body.named_modules() if isinstance(module, kinds) and name]
    if not names:
        wanted = " or ".join(kind.__name__.strip("_") for kind in kinds)
        raise UserError(f"{type(body).__name__} has no {wanted} layer for noise: choose a network such as resnet20")
    return names


def put_before(body: nn.Module, name: str, noise: nn.Module) -> None:
    """Add noise to a module's input."""
    body.set_submodule(name, nn.Sequential(noise, body.get_submodule(name)))


def put_after(body: nn.Module, name: str, noise: nn.Module) -> None:
    """Add noise to a module's output."""
    body.set_submodule(name, nn.Sequential(body.get_submodule(name), noise))


def feature_shapes(
    body: nn.Module, before: list[str], after: list[str], example: torch.Tensor
) -> dict[str, tuple[int, ...]]:
    """Return the feature shape (C, H, W) at each position, from one forward of ``example``.

    Raises:
        UserError: no such module, or it was not called, or was called with several shapes.
    """
    known = dict(body.named_modules())
    if missing := [name for name in (*before, *after) if not name or name not in known]:
        raise unknown_name("module", missing[0], [name for name in known if name])
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in (*before, *after)}

    def saw(name: str, inputs: Any, output: Any) -> None:
        if name in found:
            value = inputs[0] if name in before else output
            found[name].add(tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else ())

    with _watched(body, saw):
        _look(body, example)
    for name, shapes in found.items():
        if len(shapes) != 1 or () in shapes:
            seen = " and ".join(map(str, sorted(shapes))) if shapes - {()} else "no tensor"
            raise UserError(f"module {name} gave {seen}: choose places that give features of one shape")
    return {name: shapes.pop() for name, shapes in found.items()}


def _torchvision_places(body: TorchvisionResNet) -> list[str]:
    from torchvision.models.resnet import BasicBlock, Bottleneck

    # Noise after the last normalisation of a block is noise on the sum with the shortcut, before the last ReLU. The
    # ReLU itself cannot be wrapped, because a block has a single one that it uses repeatedly.
    last = {BasicBlock: "bn2", Bottleneck: "bn3"}
    return ["bn1"] + [f"{name}.{last[type(module)]}" for name, module in body.named_modules() if type(module) in last]


def _after_convolutions(body: nn.Module, example: torch.Tensor) -> list[str]:
    order: list[str] = []
    with _watched(body, lambda name, *_: order.append(name)):
        _look(body, example)
    order = [name for name in order if not any(True for _ in body.get_submodule(name).children())]
    places, block = [], ""
    for name in [*order, ""]:
        module = body.get_submodule(name) if name else None
        if block and isinstance(module, _WITH_CONVOLUTION):
            block = name
            continue
        if block:
            places.append(block)
        block = name if isinstance(module, _ConvNd) else ""
    return list(dict.fromkeys(places))


@contextmanager
def _watched(body: nn.Module, saw: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call ``saw`` with name, inputs and output of every module that is called inside the block."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: saw(name, inputs, output))
        for name, module in body.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _look(body: nn.Module, example: torch.Tensor) -> None:
    modes = [(module, module.training) for module in body.modules()]
    try:
        body.eval()(example)
    finally:
        for module, mode in modes:
            module.training = mode


Where = Literal["weight", "output", "input", "image", "weight+output", "weight+input"]
"""Where every convolution and linear layer receives noise: its weight (W), output (A-a), input (A-b), or both of
two; or the images alone (I)."""


class ParametricNoise(Noise):
    """The noise of PNI (He, Rakin, Fan, CVPR 2019): v + alpha * eta, eta ~ N(0, sd(v)^2) for each element of v."""

    kind: Literal["pni"] = "pni"
    init: Annotated[Number, Field(ge=0)] = 0.25
    """Initial alpha, one trained number per layer (the paper's)."""
    where: Where = "weight"
    """The paper recommends PNI-W."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Add noise to every convolution and linear layer."""
        names = layers_of(body, _ConvNd, nn.Linear)
        if self.where == "image":
            put_before(body, names[0], ScaledNoise(self).to(example))
            return
        for name in names:
            if "weight" in self.where:
                layer = body.get_submodule(name)
                parametrize.register_parametrization(layer, "weight", ScaledNoise(self).to(example), unsafe=True)
            if "output" in self.where:
                put_after(body, name, ScaledNoise(self).to(example))
            elif "input" in self.where:
                put_before(body, name, ScaledNoise(self).to(example))


class FixedNoise(Noise):
    """The noise of Random Self-Ensemble (Liu et al., ECCV 2018): Gaussian, of fixed size, before each convolution."""

    kind: Literal["rse"] = "rse"
    first: Annotated[Number, Field(ge=0)] = 0.2
    """Standard deviation before the first convolution, that is on the normalised images (the public script's)."""
    rest: Annotated[Number, Field(ge=0)] = 0.1
    """Standard deviation before every other convolution (the public script's)."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Insert a :class:`GaussianNoise` before every convolution."""
        for number, name in enumerate(layers_of(body, _ConvNd)):
            put_before(body, name, GaussianNoise(self.rest if number else self.first, self))


class ScaledNoise(NoiseModule):
    """Add alpha * sd(v) * N(0, 1) to a tensor v, alpha trained, sd taken over all of v and without a gradient."""

    def __init__(self, noise: ParametricNoise) -> None:
        super().__init__(noise)
        self.alpha = nn.Parameter(torch.tensor(noise.init))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Return ``v`` with noise."""
        if not self.enabled:
            return v
        drawn = standard_normal(v).to(v.dtype) * v.detach().std()
        return torch.addcmul(v, self.alpha.to(v.dtype), drawn)


class GaussianNoise(NoiseModule):
    """Add N(0, std^2)."""

    def __init__(self, std: float, noise: FixedNoise) -> None:
        super().__init__(noise)
        self.std = std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with noise."""
        if not self.enabled or self.std == 0:
            return x
        return x.add(standard_normal(x).to(x.dtype), alpha=self.std)

    def extra_repr(self) -> str:
        """Show the standard deviation when the model is printed."""
        return f"std={self.std}"


class PassAverage(nn.Module):
    """The average of a noisy model over several passes, as Random Self-Ensemble predicts.

    Args:
        model: a model with new draws in every pass.
        passes: forwards per prediction (10 is ours).
        average: how the passes are averaged; the logarithm of the mean softmax is the paper's.

    Raises:
        UserError: fewer than one pass.
    """

    def __init__(self, model: nn.Module, passes: int = 10, average: Average = "probabilities") -> None:
        super().__init__()
        if passes < 1:
            raise UserError(f"passes = {passes}: a vote needs at least one")
        self.model, self.passes, self.average = model, passes, average

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vote (N, K)."""
        return vote(torch.stack([self.model(pixels) for _ in range(self.passes)]), self.average)
