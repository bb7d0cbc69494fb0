"""From a name to a body: the one place that knows every architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from gambeson.base import UserError, unknown_name
from gambeson.models import lenet, mnist_nets, resnet18, resnet_cifar, torchvision_nets


@dataclass(frozen=True)
class Architecture:
    """How to build a body: ``build(in_channels, classes, image_size)``, with ``width=`` where scalable."""

    build: Callable[..., nn.Module]
    smallest: int
    """The smallest side of an image, in pixels."""
    scalable: bool = False


REGISTRY: dict[str, Architecture] = {
    "lenet": Architecture(lenet.LeNet, lenet.SMALLEST),
    "lenet5": Architecture(lenet.LeNet5, lenet.SMALLEST),
    "mnist-a": Architecture(mnist_nets.net_a, mnist_nets.SMALLEST["a"]),
    "mnist-b": Architecture(mnist_nets.net_b, mnist_nets.SMALLEST["b"]),
    "mnist-c": Architecture(mnist_nets.net_c, mnist_nets.SMALLEST["c"]),
    "mnist-d": Architecture(mnist_nets.net_d, mnist_nets.SMALLEST["d"]),
    "resnet18": Architecture(resnet18.resnet18, resnet18.SMALLEST, scalable=True),
    "resnet20": Architecture(resnet_cifar.resnet20, resnet_cifar.SMALLEST, scalable=True),
    "resnet32": Architecture(resnet_cifar.resnet32, resnet_cifar.SMALLEST, scalable=True),
    "resnet44": Architecture(resnet_cifar.resnet44, resnet_cifar.SMALLEST, scalable=True),
    "resnet56": Architecture(resnet_cifar.resnet56, resnet_cifar.SMALLEST, scalable=True),
}


def names() -> list[str]:
    """Every name :func:`gambeson.models.create` takes as it stands.

    It also takes ``torchvision:NAME``, ``torchvision:NAME@WEIGHTS`` and, after a ``resnet`` of this list, a
    width factor: ``resnet20x0.5``.
    """
    return [*REGISTRY, "resnet20x4"]


def build_body(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool = True
) -> nn.Module:
    """Build the body that ``name`` stands for, from torch's global random generator.

    Args:
        name: as :func:`gambeson.models.create` takes it.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.
        pretrained: False never fetches the weights of ``torchvision:NAME@WEIGHTS``.

    Raises:
        UserError: unknown name, bad width factor, or images too small for the architecture.
    """
    if name.startswith(torchvision_nets.PREFIX):
        return torchvision_nets.build(name, in_channels, classes, image_size, pretrained=pretrained)
    architecture, build = _find(name)
    if min(image_size) < architecture.smallest:
        raise UserError(
            f"{name} cannot take {image_size[0]}x{image_size[1]} images: the smallest it takes are "
            f"{architecture.smallest}x{architecture.smallest}"
        )
    return build(in_channels, classes, image_size)


def check_name(name: str) -> None:
    """Refuse a name that no architecture has, before anything else is asked about it."""
    if not name.startswith(torchvision_nets.PREFIX):
        _find(name)


def _find(name: str) -> tuple[Architecture, Callable[..., nn.Module]]:
    if name in REGISTRY:
        return REGISTRY[name], REGISTRY[name].build
    base, cross, factor = name.partition("x")
    if not cross or base not in REGISTRY:
        raise _unknown(name)
    architecture = REGISTRY[base]
    if not architecture.scalable:
        raise UserError(f"{name!r} asks for a width factor, which {base} does not take: write {base}")
    return architecture, partial(architecture.build, width=_width(name, base, factor))


def _width(name: str, base: str, factor: str) -> float:
    try:
        width = float(factor)
    except ValueError:
        width = math.nan
    if not (0 < width < math.inf):
        raise UserError(
            f"the width factor {factor!r} of {name!r} is not a positive number: write {base}x4 or {base}x0.5"
        )
    return width


def _unknown(name: str) -> UserError:
    try:
        elsewhere = name in torchvision_nets.known()
    except UserError:
        elsewhere = False  # the name is wrong either way, and that is what to say
    return unknown_name("model", name, [f"{torchvision_nets.PREFIX}{name}"] if elsewhere else names())
