"""The registry of defences, their construction by name, and a field type for any defence."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SerializeAsAny

from gambeson.base import Registered, Registry, UserError
from gambeson.defenses.objective import Defense


def _fault(target: Any) -> str | None:
    if inspect.isclass(target) and issubclass(target, Defense):
        return None
    return "expected a subclass of gambeson.defenses.Defense with a method terms()"


DEFENSES: Registry[type[Defense]] = Registry("defence", "gambeson.defenses", room="gambeson.defenses", check=_fault)
"""Every defence: of this library, of installed packages (group ``gambeson.defenses``), and of this process."""

register = DEFENSES.register
"""``@register("name", source="paper", cost="forwards / backwards")`` registers a defence's class."""


def names() -> list[str]:
    """Every registered name, in alphabetical order."""
    return DEFENSES.names()


def entries() -> list[Registered[type[Defense]] | UserError]:
    """Every defence; an error in place of one whose package cannot be imported."""
    return DEFENSES.entries()


def entry(name: str) -> Registered[type[Defense]]:
    """Return what is registered under a name, or defined by ``FILE.py:CLASS``.

    Raises:
        UserError: no such defence.
    """
    return DEFENSES.get(name)


def create(name: str, **settings: Any) -> Defense:
    """Build a defence by name, for example ``create("shared-adversarial", eps="8/255")``.

    Args:
        name: a registered name, or ``FILE.py:CLASS``.
        **settings: of the defence.

    Raises:
        UserError: no such defence, or a value out of range.
        TypeError: a setting is missing or unknown.
    """
    return entry(name).target(**settings)


def name_of(defense: Defense) -> str:
    """The name by which :func:`create` finds a defence's class.

    A class at the top level of a user's file is ``FILE.py:CLASS``, with the hash of the file; one without a file, as in
    a notebook, has only its class name, which ``create`` does not find.
    """
    return DEFENSES.name_of(type(defense))


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return create(value)
    return create(**value) if isinstance(value, dict) and "name" in value else value


def _write(value: Defense) -> dict[str, Any]:
    return {"name": name_of(value), **value.plain()}


AnyDefense = Annotated[SerializeAsAny[Defense], BeforeValidator(_read), PlainSerializer(_write)]
"""A defence, its name, or a mapping with its name and settings as in YAML."""
