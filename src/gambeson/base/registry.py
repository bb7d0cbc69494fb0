"""Registries of named classes and functions: the library's own, those of installed packages, and those in users' files.

A class or function is registered at its definition with the ``@register("name")`` of its package. Other packages add
to a registry with an entry point of its group, under the registered name::

    [project.entry-points."gambeson.attacks"]
    shift = "my_package.attacks:Shift"

It is imported when its name is first used. ``FILE.py:NAME`` refers to a class or function in that file.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin
from weakref import WeakKeyDictionary

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gambeson.base import user_code
from gambeson.base.errors import UserError, unknown_name

OWN = "gambeson"
"""Owner of everything in this library."""

T = TypeVar("T")
TargetT = TypeVar("TargetT")


@dataclass(frozen=True)
class Setting:
    """A setting as listings show it."""

    type: str
    default: Any
    """As plain data; None if there is no default, or if it is None."""
    required: bool
    description: str


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A registered class or function, with its name and options."""

    name: str
    target: T
    """The class or function."""
    owner: str
    """``gambeson``, an installed package, a module, or a user's file."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options given to ``register``."""

    @property
    def summary(self) -> str:
        """The first sentence of its docstring, on one line."""
        text = self.options.get("summary") or inspect.getdoc(_callable(self.target)) or ""
        first = " ".join(text.split("\n\n")[0].split())
        return _without_markup(first)

    @property
    def settings(self) -> dict[str, Setting]:
        """Its settings, by name."""
        preset = self.options.get("preset", {})
        target = _callable(self.target)
        if inspect.isclass(target) and issubclass(target, BaseModel):
            return {name: _of_field(one, preset.get(name)) for name, one in target.model_fields.items()}
        return {}

    def needs(self, setting: str) -> bool:
        """Whether it has this setting and cannot be built without it."""
        found = self.settings.get(setting)
        return found is not None and found.required and setting not in self.options.get("preset", {})

    def plain(self) -> dict[str, Any]:
        """Everything as plain data, for machine-readable listings."""
        settings = {name: vars(setting) for name, setting in self.settings.items()}
        about = {name: value for name, value in self.options.items() if isinstance(value, str)}
        return {**about, "name": self.name, "summary": self.summary, "package": self.owner, "settings": settings}


class Registry(Generic[T]):
    """The names of one kind.

    Args:
        kind: what a name refers to, such as ``attack``, for errors.
        group: the group of entry points, such as ``gambeson.attacks``.
        room: the package whose modules register the library's own names.
        check: returns what is wrong with a class or function to be registered, as the end of the sentence "X is no
            attack: ...", or None.
        what: what a user's file should define: ``class`` or ``function``.
    """

    def __init__(
        self, kind: str, group: str, *, room: str, check: Callable[[Any], str | None], what: str = "class"
    ) -> None:
        self.kind, self.group, self.what = kind, group, what
        self._room, self._check = room, check
        self._entries: dict[str, Registered[T]] = {}
        self._options: WeakKeyDictionary[Any, Mapping[str, Any]] = WeakKeyDictionary()
        self._complete = False

    def register(self, name: str, **options: Any) -> Callable[[TargetT], TargetT]:
        """Return a decorator that registers a class or function under ``name``.

        Args:
            name: its name on the command line, in YAML and in ``create``.
            **options: anything else the package needs; ``summary`` replaces the docstring's first sentence, ``preset``
                holds settings that the name implies.

        Raises:
            UserError: the name looks like a file's, is taken by another class or function (re-registering the same one
                is allowed, as when a notebook cell is run twice), or the target is of another kind.
        """

        def put(target: TargetT) -> TargetT:
            self._add(name, target, options)
            return target

        return put

    def names(self) -> list[str]:
        """Every registered name in alphabetical order, including those of installed packages; nothing is imported."""
        self._discover()
        return sorted(self._entries.keys() | {point.name for point in self._points()})

    def entries(self) -> list[Registered[T] | UserError]:
        """Every entry, ordered by name; an error in place of one that cannot be imported."""
        found: list[Registered[T] | UserError] = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except UserError as error:
                found.append(error)
        return found

    def own(self) -> list[Registered[T]]:
        """The library's own entries, in order of definition."""
        self._discover()
        return [entry for entry in self._entries.values() if entry.owner == OWN]

    def get(self, name: str) -> Registered[T]:
        """Return the entry of a name, or of ``FILE.py:NAME``.

        Raises:
            UserError: the name is unknown, two packages claim it, its package cannot be imported, or the file has an
                error or defines something else.
        """
        if user_code.is_spelling(name):
            return self._from_file(name)
        self._discover()
        entry, points = self._entries.get(name), self._points(name)
        if entry is None and not points:
            raise self.unknown(name)
        owners = sorted({_package(point) for point in points} | ({OWN} if entry and entry.owner == OWN else set()))
        if len(owners) > 1:
            raise UserError(
                f"the {self.kind} {name!r} is registered by {' and by '.join(owners)}: uninstall one of them, or ask "
                "its authors for another name"
            )
        return self._from_package(points[0]) if points else self._entries[name]

    def unknown(self, name: str) -> UserError:
        """Return the error for an unknown name, with the nearest matches."""
        if name.endswith(".py"):
            return UserError(f"{name} is a file: name {_an(self.kind)} in it, as {name}:NAME")
        return unknown_name(self.kind, name, self.names())

    def canonical(self, name: str) -> str:
        """Return the name as a run stores it: for a file, with its absolute path and the hash of its content.

        Raises:
            UserError: there is no such file, or its hash is not the one that the name carries.
        """
        return canonical(name)

    def name_of(self, target: Any) -> str:
        """Return the name under which a class or function can be retrieved; its own name if there is none.

        Registered ones are retrieved by that name, others by the file that defines them.
        """
        self._discover()
        known = [
            entry for entry in self._entries.values() if entry.target is target and not entry.options.get("preset")
        ]
        for entry in known:
            if entry.owner == OWN or self._points(entry.name):
                return entry.name
        for point in self._points():
            if (point.module, point.attr) == (_module(target), target.__qualname__):
                return point.name
        return user_code.spelling_of(target) or next((entry.name for entry in known), target.__name__)

    def _add(self, name: str, target: Any, options: Mapping[str, Any], owner: str | None = None) -> Registered[T]:
        if user_code.is_spelling(name) or not name or name != name.strip():
            raise UserError(f"{name!r} cannot be the name of {_an(self.kind)}: choose lower-case words with hyphens")
        if (fault := self._check(target)) is not None:
            raise UserError(f"{_place(target)} is no {self.kind}: {fault}")
        known = self._entries.get(name)
        if known is not None and _place(known.target) != _place(target):
            raise UserError(
                f"the {self.kind} {name!r} of {_place(target)} is registered already, by {_place(known.target)} of "
                f"{known.owner}: choose another name"
            )
        module = _module(target)
        own = module == OWN or module.startswith(f"{OWN}.")
        entry = Registered(name=name, target=target, owner=owner or (OWN if own else module), options=dict(options))
        self._entries[name] = entry
        self._options[target] = entry.options
        return entry

    def _from_package(self, point: EntryPoint) -> Registered[T]:
        package = _package(point)
        try:
            target = point.load()
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split()) or "no message"
            raise UserError(
                f"the {self.kind} {point.name!r} comes from the package {package}, whose import fails "
                f"({type(error).__name__}: {reason}): fix that package or uninstall it"
            ) from None
        known = self._entries.get(point.name)
        if known is not None and known.target is target:
            self._entries[point.name] = replace(known, owner=package)
            return self._entries[point.name]
        other = next((entry.name for entry in self._entries.values() if entry.target is target), None)
        if other is not None:
            raise UserError(
                f"the package {package} announces the {self.kind} {other!r} as {point.name!r}: give its entry point "
                "and its @register the same name"
            )
        return self._add(point.name, target, {}, package)

    def _from_file(self, name: str) -> Registered[T]:
        file, inner = user_code.parts(name)
        target = user_code.load(name, self.what)
        if (fault := self._check(target)) is not None:
            raise UserError(f"{inner} of {file} is no {self.kind}: {fault}")
        options = self._options.get(target, {})  # if the file registers it; the last execution of the file counts
        return Registered(name=user_code.pinned(name), target=target, owner=str(file), options=options)

    def _discover(self) -> None:
        """Import the package, each module of which registers what it defines."""
        if self._complete:
            return
        self._complete = True  # modules of the package may look up names while they are imported
        try:
            room = importlib.import_module(self._room)
            for module in pkgutil.walk_packages(room.__path__, f"{self._room}."):
                importlib.import_module(module.name)
        except BaseException:
            self._complete = False
            raise

    def _points(self, name: str | None = None) -> list[EntryPoint]:
        return [point for point in _installed(self.group, tuple(sys.path)) if name in (None, point.name)]


@functools.lru_cache(32)
def _installed(group: str, _path: tuple[str, ...]) -> EntryPoints:
    """The entry points of all packages on a path; reading them takes milliseconds, and studies ask often."""
    return entry_points(group=group)


def canonical(name: str) -> str:
    """Return a name as runs store it; see :meth:`Registry.canonical`."""
    return user_code.pinned(name) if user_code.is_spelling(name) else name


def _package(point: EntryPoint) -> str:
    return point.value.partition(":")[0] if point.dist is None else point.dist.name


def _callable(target: Any) -> Any:
    return target.func if isinstance(target, functools.partial) else target


def _module(target: Any) -> str:
    return str(getattr(_callable(target), "__module__", None) or "")


def _place(target: Any) -> str:
    """Dotted name of a class or function."""
    inner = _callable(target)
    return f"{_module(target)}.{getattr(inner, '__qualname__', None) or type(inner).__name__}"


def _without_markup(text: str) -> str:
    """Return the words of a docstring without roles and quotes of reStructuredText."""
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"\1", text)


def _an(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _of_field(one: FieldInfo, preset: Any) -> Setting:
    default = None if one.is_required() else one.get_default(call_default_factory=True)
    return Setting(
        type=_type(one.annotation),
        default=_plain(default if preset is None else preset),
        required=one.is_required(),
        description=_without_markup(" ".join((one.description or "").split())),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _type(annotation: Any) -> str:
    """Return a type as it would be written by hand, without its validators."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(repr(value) for value in inner)
    if origin in (Union, UnionType):
        return " | ".join(_type(one) for one in inner)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if one is Ellipsis else _type(one) for one in inner)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
