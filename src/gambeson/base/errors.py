"""Errors a user can cause. Each is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """An error the user can fix; the command line prints it without a traceback and exits with code 2.

    Args:
        message: one sentence.
        path: the setting at fault, from the outermost object to the innermost field; empty if it is none.
        reason: what is wrong with it, without its name; for callers that know another name of the setting.
    """

    def __init__(self, message: str, path: tuple[str, ...] = (), reason: str = "") -> None:
        super().__init__(message)
        self.path, self.reason = path, reason or message


class UnknownSetting(UserError, TypeError):
    """A setting is missing or does not exist; also a ``TypeError``, as for any other wrong keyword."""


class OutOfSpace(UserError):
    """A file could not be written; nothing half-written was left behind."""


class DataWarning(UserWarning):
    """Something about data that the user should know and that does not stop the work."""


def as_text(name: Any) -> str:
    """Return a name, or a path as text.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise UserError(f"{name!r} is no name or path: give text")
    return str(name)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list, with the nearest matches first.

    Args:
        kind: what the name refers to, such as ``"model"``.
        name: the name given, or whatever came in its place.
        known: all accepted names.
    """
    names, near = sorted(known), list[str]()
    if isinstance(name, str):
        near = [other for other in names if name and name in other][:3]
        near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")


def count(number: int, what: str) -> str:
    """Return a number with its noun, such as ``1 epoch`` or ``2 epochs``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def duration(seconds: float) -> str:
    """Write a time by its two largest units: ``4.1 s``, ``41 s``, ``3 min 12 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, to quote it in another one."""
    if isinstance(error, OSError) and error.strerror:  # without its number
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__


_NO_SECOND = (
    "has an operation without the derivatives that this needs ({error}): for the defence jacobian choose "
    "estimator='input' with derivative='finite-difference', or another implementation of that operation"
)
_LIMITS = {
    "use_reentrant": "checkpoints with use_reentrant=True, through which no gradient with respect to images can be "
    "taken: pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or turn checkpointing off",
    "element 0 of tensors does not require grad": "has no graph from its weights to its logits: remove no_grad, "
    "detach() or item() from its forward",
    "setup_context": _NO_SECOND,
    "derivative for": _NO_SECOND,
    "forward AD": _NO_SECOND,
    "forward mode AD": _NO_SECOND,
    "differentiate twice": _NO_SECOND,
    "torch.utils.checkpoint: ": "checkpoints, and recomputes something else than its forward was: turn that off",
    "in the TorchScript interpreter": _NO_SECOND,
    "nference tensor": "was built inside torch.inference_mode: build it, or clone its weights, outside",
    "supported on ScriptModules": "is a TorchScript program, which takes no hooks: give the module it was made of",
    "in-place operation": "changes its input in place ({error}): let it work on a copy, such as images.clone()",
}


@contextmanager
def autograd_limits() -> Iterator[None]:
    """Turn what autograd cannot do with a model, inside the block, into a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        for sign, fault in _LIMITS.items():
            if sign in str(error):
                line = " ".join(str(error).split("\n")[0].split())[:120].rstrip(". ")
                raise UserError(f"the model {fault.format(error=line)}") from error
        raise
