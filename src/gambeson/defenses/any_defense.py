"""A field that holds any defence, in Python as an object and in YAML by its name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SerializeAsAny

from gambeson.defenses.objective import Defense


def _read(value: Any) -> Any:
    from gambeson.defenses import registry  # it imports this module

    if isinstance(value, str):
        return registry.create(value)
    return registry.create(**value) if isinstance(value, dict) and "name" in value else value


def _write(value: Defense) -> dict[str, Any]:
    from gambeson.defenses import registry

    return {"name": registry.name_of(value), **value.plain()}


AnyDefense = Annotated[SerializeAsAny[Defense], BeforeValidator(_read), PlainSerializer(_write)]
"""A defence, or its name, or a mapping of its name and settings, as YAML has it."""
