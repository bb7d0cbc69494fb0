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


class DataWarning(UserWarning):
    """Something about data that the user should know and that does not stop the work."""


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
