"""Errors a user can cause. Each is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def count(number: int, what: str) -> str:
    """Return a number with its noun, such as ``1 epoch`` or ``2 epochs``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
