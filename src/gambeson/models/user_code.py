"""Models built by a function in a user's file: ``FILE.py:FUNCTION``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gambeson.base import UserError
from gambeson.base.user_code import beside, canonical, file_of, is_spelling, member, parts, run, short, told

__all__ = ["build", "canonical", "file_of", "is_spelling", "load_function", "short", "told"]

_KNOWN = ("in_channels", "classes", "image_size")


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
        raise UserError(f"{file} does not exist: the model {name} is built by the function {function} of that file")
    canonical(name)  # a hash in the name must match the file
    return member(run(file), file, function, "function")


def build(name: str, in_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
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
