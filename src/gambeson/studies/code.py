"""The code behind a result: a hash of the source of every module that makes it.

A stored result is used again only if the settings *and* the code that made it are the same. The modules that count are
those that imports reach from the ones that do the work; a name that a package re-exports leads to the module that
defines it, so that a change in one attack leaves the results of the others alone. Comments, docstrings and blank lines
do not count, nor do the modules of :data:`SHOWN`. Other packages do not count either: their versions are stored beside
each result.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gambeson

ROOT = Path(gambeson.__file__).parent
SHOWN = ("gambeson.base.progress", "gambeson.base.notebook", "gambeson.auditing.display")
"""Modules that show results and change none."""


def code_hash(modules: Iterable[str]) -> str:
    """Return a hash of the source behind some modules of this package; others have none.

    Args:
        modules: dotted names, such as ``gambeson.training.run``.
    """
    return _hash(frozenset(name for name in modules if name in _texts()))


@cache
def _hash(modules: frozenset[str]) -> str:
    reached = sorted(_reach(modules))
    lines = "\0".join(f"{name}\0{_module(name).code}" for name in reached)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@cache
def _texts() -> dict[str, str]:
    """Every module's source, read at once: what this process runs, also where a file changes meanwhile."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = (ROOT.name, *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return found


@dataclass(frozen=True)
class _Module:
    """What is asked of a module's syntax tree, collected in one walk."""

    names: dict[str, tuple[str, str]]
    """Where each imported name comes from: module and name there."""
    sources: set[tuple[str, str]]
    """The same of all imports, also where two bind one name."""
    whole: set[str]
    """Modules that are imported themselves."""
    code: str
    """The source without comments, docstrings and blank lines."""


@cache
def _module(name: str) -> _Module:
    text = _texts()[name]
    names: dict[str, tuple[str, str]] = {}
    sources, whole = set[tuple[str, str]](), set[str]()
    alone: set[int] = set()
    strings: list[tuple[int, int, int]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            whole |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {one.asname or one.name: (node.module, one.name) for one in node.names}
            sources |= {(node.module, one.name) for one in node.names}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            alone.add(id(node.value))
        elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            strings.append((id(node), node.lineno, node.end_lineno or node.lineno))
    silent = {line for key, first, last in strings if key in alone for line in range(first, last + 1)}
    inside = {line for key, first, last in strings if key not in alone for line in range(first + 1, last + 1)}
    lines = [
        line.rstrip()
        for number, line in enumerate(text.splitlines(), 1)
        if number in inside or (number not in silent and line.strip() and not line.lstrip().startswith("#"))
    ]
    return _Module(names, sources, whole, "\n".join(lines))


@cache
def _reach(roots: frozenset[str]) -> frozenset[str]:
    seen: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in seen or name in SHOWN or name not in _texts():
            continue
        seen.add(name)
        todo += [*_module(name).whole, *(_home(*source) for source in _module(name).sources)]
    return frozenset(seen)


def _home(module: str, name: str) -> str:
    """The module that defines a name which is imported from ``module``."""
    if f"{module}.{name}" in _texts():
        return f"{module}.{name}"
    source = _module(module).names.get(name) if module in _texts() else None
    return module if source is None or source[0] == module else _home(*source)
