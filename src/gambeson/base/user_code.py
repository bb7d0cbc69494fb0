"""Classes and functions in users' files, named ``FILE.py:NAME`` on the command line, in YAML and in Python.

The file is executed only when it is named. A run stores the name pinned, with the file's absolute path and the hash of
its content, so that later changes are detected.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gambeson.base.errors import UserError, as_text

_SPELLING = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)(#sha256=(?P<digest>[0-9a-f]+))?")
_DIGITS = 16
"""Hash digits in a pinned name."""
_PREFIX = "gambeson_user_"
_LOADED: dict[tuple[Path, str], ModuleType] = {}


def is_spelling(name: Any) -> bool:
    """Whether a name has the form ``FILE.py:NAME``, with or without ``#sha256=...``.

    Raises:
        UserError: it is no text.
    """
    return _SPELLING.fullmatch(as_text(name)) is not None


def parts(name: str) -> tuple[Path, str]:
    """Return the absolute path and the name within the file.

    Raises:
        UserError: the name has another form.
    """
    found = _SPELLING.fullmatch(name)
    if found is None:
        raise UserError(f"{name!r} names no function of a file: write FILE.py:FUNCTION")
    return Path(os.path.abspath(Path(found["file"]).expanduser())), found["name"]


def file_of(name: str) -> Path:
    """Return the absolute path of the file in a name."""
    return parts(name)[0]


def canonical(name: str) -> str:
    """Return ``FILE.py:NAME`` with the file's absolute path, so that it means the same from every folder.

    A hash in the name is verified and kept.

    Raises:
        UserError: the file has another hash.
    """
    file, inner = parts(name)
    return pinned(name) if "#" in name.rpartition(":")[2] else f"{file}:{inner}"


def pinned(name: str) -> str:
    """Return the canonical spelling with the hash of the file: ``FILE.py:NAME#sha256=0123456789abcdef``.

    Raises:
        UserError: no such file, or the name has a hash that differs from the file's.
    """
    file, inner = parts(name)
    digest = hashlib.sha256(_read(file, name)).hexdigest()
    found = _SPELLING.fullmatch(name)
    given = found["digest"] if found else None
    if given is not None and not digest.startswith(given):
        raise UserError(
            f"{file} was changed since {inner} was stored (its sha256 begins with {digest[:_DIGITS]}, not {given}): "
            f"restore the file, or name {file}:{inner} without #sha256=... to take it as it is now"
        )
    return f"{file}:{inner}#sha256={digest[:_DIGITS]}"


def short(name: str) -> str:
    """Return the short form for tables and folders: ``NAME`` for ``FILE.py:NAME``; other names are unchanged."""
    return parts(name)[1] if is_spelling(name) else name


def load(name: str, what: str = "class") -> Any:
    """Return the class or function that a file defines; each version of a file is executed once.

    Args:
        name: ``FILE.py:NAME``; a hash in it must match the file.
        what: what is expected, for errors: ``class`` or ``function``.

    Raises:
        UserError: no such file or name, a hash that does not match, or an error in the file, with its line.
    """
    file, inner = parts(name)
    key = (file, pinned(name).rpartition("=")[2])
    if key not in _LOADED:
        _LOADED[key] = run(file)
    return member(_LOADED[key], file, inner, what)


def run(file: Path) -> ModuleType:
    """Execute a file as a new module, which can import the modules next to it.

    Raises:
        UserError: an error in the file, with its line.
    """
    label = module_name(file)
    spec = importlib.util.spec_from_file_location(label, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} cannot be run as Python: name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # dataclasses and torch.compile look a class's module up by name
    with told(file, f"running {file}"), beside(file):
        spec.loader.exec_module(module)
    return module


def member(module: ModuleType, file: Path, name: str, what: str) -> Any:
    """Return a class or function of a module made by :func:`run`.

    Raises:
        UserError: no such name, or it is not callable.
    """
    found = getattr(module, name, None)
    if found is None or not (callable(found) or what == "class"):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        own = [key for key in known if getattr(getattr(module, key), "__module__", "") == module.__name__]
        raise UserError(
            f"{file} has no {what} {name!r}: it defines {', '.join(own) or 'none'}; write {file.name}:{what.upper()}"
        )
    return found


def module_name(file: Path) -> str:
    """Return the module name for a file."""
    return _PREFIX + hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()


def spelling_of(target: Any) -> str | None:
    """Return the pinned spelling of a class or function at the top level of a Python file; None where it has none."""
    inner = getattr(target, "__qualname__", "")
    for (file, digest), kept in _LOADED.items():  # the file as it was executed, even if changed since
        if getattr(kept, inner, None) is target:
            return f"{file}:{inner}#sha256={digest}"
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    source = getattr(module, "__file__", None)
    if not inner.isidentifier() or source is None or getattr(module, inner, None) is not target:
        return None
    path = Path(source).absolute()
    return pinned(f"{path}:{inner}") if path.suffix == ".py" and path.is_file() else None


@contextmanager
def told(file: Path, doing: str) -> Iterator[None]:
    """Turn an error in the user's code into one sentence with the line of the file; this library's own are one."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{doing} failed{_line_of(file, error)} ({type(error).__name__}: {reason}): fix it there and retry"
        ) from None


@contextmanager
def blamed(owner: object, doing: str) -> Iterator[None]:
    """Do as :func:`told` where the class of an object, or a function, comes from a user's file; else do nothing."""
    target = owner if inspect.isroutine(owner) else type(owner)
    module = sys.modules.get(target.__module__ or "")
    if module is None or not module.__name__.startswith(_PREFIX) or module.__file__ is None:
        yield
        return
    with told(Path(module.__file__), doing):
        yield


@contextmanager
def beside(file: Path) -> Iterator[None]:
    """Let the file import the modules next to it, as a script can."""
    folder = str(file.parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _read(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{file} does not exist: it should define {short(name)}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): it should define {short(name)}") from None


def _line_of(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == file:
        return f" in line {error.lineno} of {file}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" in line {lines[-1]} of {file}" if lines else ""
