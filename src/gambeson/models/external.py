"""External models by name: timm, transformers, the Hugging Face hub, and functions in users' files.

Pixels are normalised before the external body, and a card with its name is stored with the weights, so that a run
folder can be loaded again. A user's file is then executed again to build the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, one_line, seeded, user_code
from gambeson.base.user_code import beside, file_of, is_spelling, member, parts, run, told
from gambeson.models import hubs
from gambeson.models.outputs import KEYS, as_logits, at_image_size

_KNOWN = ("in_channels", "classes", "image_size")


def is_external(name: str) -> bool:
    """Whether a name has the form ``timm:…``, ``transformers:…``, ``hf://…`` or ``FILE.py:FUNCTION``."""
    return name.startswith(hubs.PREFIXES) or is_spelling(name)


def canonical(name: str) -> str:
    """Return the name as cards store it: files and folders by their absolute paths.

    Raises:
        UserError: a Python file without the name of a function.
    """
    if is_spelling(name):
        return user_code.canonical(name)
    if name.endswith(".py"):
        raise UserError(f"{name} names a file but no function of it: write {name}:FUNCTION")
    return hubs.canonical(name)


def defaults(name: str) -> dict[str, Any]:
    """Return what is known of an external model before it is built, as keywords of ``create``.

    A user's own model receives raw pixels: mean 0, std 1.

    Raises:
        UserError: a library is missing, or the name is unknown.
    """
    return hubs.defaults(name) if name.startswith(hubs.PREFIXES) else {"mean": 0.0, "std": 1.0}


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
    if name.startswith(hubs.PREFIXES):
        body = hubs.build(name, in_channels, classes, image_size, pretrained=pretrained)
    else:
        body = called(name, in_channels, classes, image_size)
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
    key = next((key for key in KEYS if key in answer), None) if isinstance(answer, Mapping) else None
    if key is None and not isinstance(answer, torch.Tensor):
        keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise UserError(
            f"{name} returned {type(answer).__name__}{keys} for {given}: expected a tensor of logits (N, {classes}), "
            "or a mapping with `logits` or `out`"
        )
    answer = answer if key is None else answer[key]
    if key is not None or at_image_size(answer, images) is not answer:
        body = as_logits(body, key or KEYS[0])
    if answer.ndim not in (2, 4) or tuple(answer.shape[:2]) != (2, classes):
        raise UserError(
            f"{name} returned shape {tuple(answer.shape)} for {given}: the data have {classes} classes, so (2, "
            f"{classes}) was expected; choose data and model that fit each other"
        )
    return body


def _answer(name: str, body: nn.Module, images: torch.Tensor, given: str) -> Any:
    if is_spelling(name):
        with told(file_of(name), f"sending {given} through the model of {name}"):
            return body(images)
    try:
        return body(images)
    except Exception as error:  # others' code raises what it likes
        raise UserError(
            f"{name} cannot take {given} ({one_line(error)}): choose other images or another model"
        ) from None


@torch.no_grad()
def channels(name: str) -> int | None:
    """Return whether a user's model takes one or three channels; None: either, or its function makes it for any.

    The model is sent an image of each, and takes those with which it comes further.

    Args:
        name: ``FILE.py:FUNCTION``.

    Raises:
        UserError: as :func:`build_body`.
    """
    if "in_channels" in _taken(load_function(name), dict.fromkeys(_KNOWN), name):
        return None
    body, steps = called(name, 3, 2, (32, 32)).eval(), {1: 0, 3: 0}
    weight = next(body.parameters(), torch.zeros(0))
    for count in steps:

        def reached(*_: Any, count: int = count) -> None:
            steps[count] += 1

        hooks = [module.register_forward_hook(reached) for module in body.modules()]
        with seeded(0, "try"), suppress(Exception):  # images of this size may not fit
            body(torch.full((2, count, 32, 32), 0.5, dtype=weight.dtype, device=weight.device))
        for hook in hooks:
            hook.remove()
    return None if steps[1] == steps[3] else max(steps, key=lambda count: steps[count])


def load_function(name: str) -> Callable[..., Any]:
    """Execute the user's file and return the named function.

    The file is executed at every call.

    Args:
        name: ``FILE.py:FUNCTION``.

    Raises:
        UserError: no such file or function, or an error in the file, with its line.
    """
    file, function = parts(name)
    if not file.is_file():
        raise UserError(f"{file} does not exist: {name} names the function {function} of that file")
    user_code.canonical(name)  # a hash in the name must match the file
    return member(run(file), file, function, "function")


def called(name: str, in_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Call the user's function to build a model.

    Args:
        name: ``FILE.py:FUNCTION``. The function receives those of the three sizes below that it has parameters for.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.

    Raises:
        UserError: the function fails, needs other arguments, or does not return a module.
    """
    file, function = parts(name)
    make = load_function(name)
    sizes = dict(zip(_KNOWN, (in_channels, classes, image_size), strict=True))
    with told(file, f"calling {function}"), beside(file):
        model = make(**_taken(make, sizes, f"{function} of {file}"))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{function} of {file} returned a {type(model).__name__}: expected a torch.nn.Module from images "
            "(N, C, H, W) in [0, 1] to logits (N, K)"
        )
    return model


def _taken(make: Callable[..., Any], sizes: dict[str, Any], title: str) -> dict[str, Any]:
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # a builtin with an unknown signature gets no arguments
        return {}
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.name not in sizes or parameter.kind is parameter.POSITIONAL_ONLY)
    ]
    if needed:
        raise UserError(
            f"{title} needs {', '.join(needed)}, which is not known here: give defaults; only {', '.join(_KNOWN)} "
            "are passed, as keywords"
        )
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in sizes.items() if key in names}
