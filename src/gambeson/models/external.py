"""External models by name: timm, transformers, and users' files.

Pixels are normalised before the external body, and a card with its name is stored with the weights, so that a run
folder can be loaded again. A user's file is then executed again to build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, seeded
from gambeson.models import hubs, user_code
from gambeson.models.pixel_model import as_logits

_HUBS = (hubs.TIMM, hubs.TRANSFORMERS)
_KEYS = ("logits", "out")


def is_external(name: str) -> bool:
    """Whether a name has the form ``timm:…``, ``transformers:…`` or ``FILE.py:FUNCTION``."""
    return name.startswith(_HUBS) or user_code.is_spelling(name)


def canonical(name: str) -> str:
    """Return the name as cards store it: a user's file and a folder of transformers by their absolute paths.

    Raises:
        UserError: a Python file without the name of a function.
    """
    if user_code.is_spelling(name):
        return user_code.canonical(name)
    if name.endswith(".py"):
        raise UserError(f"{name} names a file but no function of it: write {name}:FUNCTION")
    if name.startswith(hubs.TRANSFORMERS):
        place = Path(name.removeprefix(hubs.TRANSFORMERS)).expanduser()
        return f"{hubs.TRANSFORMERS}{place.absolute()}" if place.is_dir() else name
    return name


def defaults(name: str) -> dict[str, Any]:
    """Return what is known of an external model before it is built, as keywords of ``create``.

    A user's own model receives raw pixels: mean 0, std 1.

    Raises:
        UserError: a library is missing, or the name is unknown.
    """
    return hubs.defaults(name) if name.startswith(_HUBS) else {"mean": 0.0, "std": 1.0}


def build_body(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool = True
) -> nn.Module:
    """Build an external model and test it on two images.

    Args:
        name: see :func:`is_external`.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.
        pretrained: False downloads no weights; a user's own function may still load some.

    Raises:
        UserError: it cannot be built, does not accept these images, or does not return such logits.
    """
    if not name.startswith(_HUBS):
        body = user_code.build(name, in_channels, classes, image_size)
    else:
        body = hubs.build(name, in_channels, classes, image_size, pretrained=pretrained)
    return tried(name, body, in_channels, classes, image_size)


@torch.no_grad()
def tried(name: str, body: nn.Module, in_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the body after checking its logits on two images; logits are extracted from a mapping.

    Raises:
        UserError: it does not accept these images, or returns something else.
    """
    modes = [(module, module.training) for module in body.modules()]
    weight = next(body.parameters(), torch.zeros(0))
    images = torch.full((2, in_channels, *image_size), 0.5, dtype=weight.dtype, device=weight.device)
    given = f"images of shape {tuple(images.shape)}"
    try:
        body.eval()
        with seeded(0, "try"):
            answer = _answer(name, body, images, given)
    finally:
        for module, mode in modes:
            module.training = mode
    if isinstance(answer, Mapping) and (key := next((key for key in _KEYS if key in answer), None)):
        body, answer = as_logits(body, key), answer[key]
    elif not isinstance(answer, torch.Tensor):
        raise UserError(
            f"{name} returned {type(answer).__name__} for {given}: expected a tensor of logits (N, {classes}), or a "
            "mapping with `logits` or `out`"
        )
    if answer.ndim not in (2, 4) or tuple(answer.shape[:2]) != (2, classes):
        raise UserError(
            f"{name} returned shape {tuple(answer.shape)} for {given}: the data have {classes} classes, so (2, "
            f"{classes}) was expected; choose data and model that fit each other"
        )
    return body


def _answer(name: str, body: nn.Module, images: torch.Tensor, given: str) -> Any:
    if user_code.is_spelling(name):
        with user_code.told(user_code.file_of(name), f"sending {given} through the model of {name}"):
            return body(images)
    try:
        return body(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot take {given} ({reason}): choose other images or another model") from None
