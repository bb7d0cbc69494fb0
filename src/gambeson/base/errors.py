"""Errors a user can cause. Each is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error the user can fix; the command line prints it without a traceback and exits with code 2."""


class UnknownSetting(UserError, TypeError):
    """A setting is missing or does not exist; also a ``TypeError``, as for any other wrong keyword."""


class OutOfSpace(UserError):
    """A file could not be written; nothing half-written was left behind."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list, with the nearest matches first.

    Args:
        kind: what the name refers to, such as ``"model"``.
        name: the name given.
        known: all accepted names.
    """
    names = sorted(known)
    near = [other for other in names if name and name in other][:3]
    near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, to quote it in another one."""
    return " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
