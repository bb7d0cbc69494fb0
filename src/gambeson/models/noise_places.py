"""Positions of noise in a body, and insertion with as little renaming as possible."""

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
        _run_once(body, example)
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
        output = _run_once(body, example)
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
    if isinstance(output, torch.Tensor) and output.ndim == 4:
        places = places[:-1]  # the last convolution gives the logits
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
def _run_once(body: nn.Module, example: torch.Tensor) -> Any:
    modes = [(module, module.training) for module in body.modules()]
    try:
        return body.eval()(example)
    finally:
        for module, mode in modes:
            module.training = mode
