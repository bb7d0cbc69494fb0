"""A model that a user's own file builds: ``FILE.py:FUNCTION``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from gambeson.base import UserError

_SPELLING = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_KNOWN = ("in_channels", "classes", "image_size")


def is_spelling(name: str) -> bool:
    """Whether a name is spelt ``FILE.py:FUNCTION``."""
    return _SPELLING.fullmatch(name) is not None


def canonical(name: str) -> str:
    """Return ``FILE.py:FUNCTION`` with the file's absolute path, so that it means the same from every folder."""
    file, function = _parts(name)
    return f"{file}:{function}"


def load_function(name: str) -> Callable[..., Any]:
    """Run the user's file and return the function it was named with.

    The file is run anew at every call, as a module of its own; what stands beside it can be imported by it. It is the
    user's own code, and nothing but its name on a command line, in a ``run.yaml`` or in a model's card makes it run.

    Args:
        name: ``FILE.py:FUNCTION``.

    Raises:
        UserError: no such file or function, or an error in the file, told with its line.
    """
    file, function = _parts(name)
    if not file.is_file():
        raise UserError(f"{file} does not exist: the model {name} is built by the function {function} of that file")
    label = "gambeson_user_" + hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(label, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} cannot be run as Python: name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # dataclasses and torch.compile look a class's module up by name
    with told(file, f"running {file}"), _beside(file):
        spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        own = [key for key in known if getattr(getattr(module, key), "__module__", "") == label]
        raise UserError(
            f"{file} has no function {function!r}: it defines {', '.join(own) or 'none'}; write {file.name}:FUNCTION"
        )
    return found


def build(name: str, in_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Call the user's function for its model.

    Args:
        name: ``FILE.py:FUNCTION``. Of the three sizes below the function gets those it has parameters for.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.

    Raises:
        UserError: the function fails, needs something else, or returns no module.
    """
    file, function = _parts(name)
    make = load_function(name)
    sizes = dict(zip(_KNOWN, (in_channels, classes, image_size), strict=True))
    with told(file, f"calling {function}"), _beside(file):
        model = make(**_taken(make, sizes, f"{function} of {file}"))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{function} of {file} returned a {type(model).__name__}: expected a torch.nn.Module from images "
            "(N, C, H, W) in [0, 1] to logits (N, K)"
        )
    return model


@contextmanager
def told(file: Path, doing: str) -> Iterator[None]:
    """Turn an error of the user's code inside the block into one sentence with the line of their file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{doing} failed{_line_of(file, error)} ({type(error).__name__}: {reason}): mend it there and try again"
        ) from None


def file_of(name: str) -> Path:
    """Return the absolute path of the file that a spelling names."""
    return _parts(name)[0]


def _parts(name: str) -> tuple[Path, str]:
    found = _SPELLING.fullmatch(name)
    if found is None:
        raise UserError(f"{name!r} names no function of a file: write FILE.py:FUNCTION")
    return Path(found["file"]).expanduser().absolute(), found["function"]


def _taken(make: Callable[..., Any], sizes: dict[str, Any], title: str) -> dict[str, Any]:
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # a builtin: nothing is known, so nothing is given
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


def _line_of(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == file:
        return f" in line {error.lineno} of {file}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" in line {lines[-1]} of {file}" if lines else ""


@contextmanager
def _beside(file: Path) -> Iterator[None]:
    """Let the file import what stands beside it, as a script can."""
    folder = str(file.parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
