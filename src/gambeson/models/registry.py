"""The registry of architectures, and construction of bodies by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from gambeson.base import Registered, Registry, UserError, unknown_name
from gambeson.base.registry import OWN
from gambeson.models import torchvision_nets

Build = Callable[..., nn.Module]
"""``build(in_channels, classes, image_size)`` returns a body; scalable ones also take ``width=``."""


def _fault(target: object) -> str | None:
    return None if callable(target) else "expected a class or function of (in_channels, classes, image_size)"


MODELS: Registry[Build] = Registry("model", "gambeson.models", room="gambeson.models", check=_fault, what="function")
"""Every architecture: of this library, of installed packages (group ``gambeson.models``), and of this process."""

register = MODELS.register
"""Registers a module class, or a function that builds one, as ``@register("name", smallest=4, scalable=False)``.
``smallest`` is the smallest side of an image in pixels (default 1); ``scalable`` ones take ``width=``."""


def names() -> list[str]:
    """Every registered name, in alphabetical order.

    :func:`gambeson.models.create` also takes ``torchvision:NAME``, ``torchvision:NAME@WEIGHTS`` and, after a ``resnet``
    of this list, a width factor: ``resnet20x0.5``.
    """
    return sorted([*MODELS.names(), "resnet20x4"])


def entries() -> list[Registered[Build] | UserError]:
    """Every architecture; an error in place of one whose package cannot be imported."""
    return MODELS.entries()


def build_body(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool = True
) -> nn.Module:
    """Build the body of a name, from torch's global random generator.

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
    smallest = architecture.options.get("smallest", 1)
    if min(image_size) < smallest:
        raise UserError(
            f"{name} cannot take {image_size[0]}x{image_size[1]} images: the smallest it takes are "
            f"{smallest}x{smallest}"
        )
    return build(in_channels, classes, image_size)


def check_name(name: str) -> None:
    """Raise unless an architecture has this name."""
    if not name.startswith(torchvision_nets.PREFIX):
        _find(name)


def is_ours(name: str) -> bool:
    """Whether an architecture belongs to this library or torchvision."""
    return name.startswith(torchvision_nets.PREFIX) or _find(name)[0].owner == OWN


def _find(name: str) -> tuple[Registered[Build], Build]:
    known = MODELS.names()
    if name in known:
        return MODELS.get(name), MODELS.get(name).target
    base, cross, factor = name.rpartition("x")
    if not cross or base not in known:
        raise _unknown(name)
    architecture = MODELS.get(base)
    if not architecture.options.get("scalable"):
        raise UserError(f"{name!r} asks for a width factor, which {base} does not take: write {base}")
    return architecture, partial(architecture.target, width=_width(name, base, factor))


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
    if name.startswith("zoo:") or Path(name).exists():
        return UserError(
            f"{name!r} is a trained model: expected an architecture, such as lenet5, and the trained model as init "
            "(`gambeson train --init`); or harden it as it is (`gambeson harden`)"
        )
    try:
        elsewhere = name in torchvision_nets.known()
    except UserError:
        elsewhere = False  # the name is wrong either way
    return unknown_name("model", name, [f"{torchvision_nets.PREFIX}{name}"] if elsewhere else names())
