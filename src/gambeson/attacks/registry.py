"""The registry of attacks, per-image and universal, and their construction by name."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from gambeson.base import Config, Registered, Registry, UserError

Kind = Literal["image", "universal"]
_FORMS = {"image": "__call__(model, x, y, *, seed, task)", "universal": "craft(model, data, *, seed)"}


def _fault(target: Any) -> str | None:
    if not (inspect.isclass(target) and issubclass(target, Config)):
        return "expected a class with settings, a subclass of gambeson.base.Config such as gambeson.attacks.PGD"
    kind = _kind(target)
    if kind is None:
        return f"expected {_FORMS['image']}, or {_FORMS['universal']} of UniversalAttack"
    given, named = ((None,) * 4, ("seed", "task")) if kind == "image" else ((None,) * 3, ("seed",))
    call: Any = getattr(target, "__call__" if kind == "image" else "craft")
    try:
        inspect.signature(call).bind(*given, **dict.fromkeys(named))
    except TypeError as error:
        return f"expected {_FORMS[kind]}, and it has {inspect.signature(call)} ({error})"
    return None


def _kind(target: Any) -> Kind | None:
    for one in target.__mro__:
        if "craft" in vars(one):
            return "universal"
        if "__call__" in vars(one):
            return "image"
    return None


ATTACKS: Registry[Any] = Registry("attack", "gambeson.attacks", room="gambeson.attacks", check=_fault)
"""Every attack: of this library, of installed packages (group ``gambeson.attacks``), and of this process."""

register = ATTACKS.register
"""``@register("name", source="paper", cost="forwards / backwards")`` registers an attack's class."""


def names(kind: Kind) -> list[str]:
    """Every name of a kind, in alphabetical order."""
    return [entry.name for entry in entries() if isinstance(entry, Registered) and _kind(entry.target) == kind]


def entries() -> list[Registered[Any] | UserError]:
    """Every attack; an error in place of one whose package cannot be imported."""
    return ATTACKS.entries()


def entry(name: str) -> Registered[Any]:
    """Return what is registered under a name, or defined by ``FILE.py:CLASS``.

    Raises:
        UserError: no such attack.
    """
    return ATTACKS.get(name)


def kind_of(entry: Registered[Any]) -> Kind:
    """Whether an attack makes one perturbation per image or one for all."""
    return _kind(entry.target) or "image"


def canonical(name: str) -> str:
    """Return a name as runs store it: ``FILE.py:CLASS`` with the file's absolute path and the hash of its content.

    Raises:
        UserError: no such file, or it has changed since the name was stored.
    """
    return ATTACKS.canonical(name)


Name = Annotated[str, AfterValidator(canonical)]
"""The name of an attack in the settings of a run, as :func:`canonical` gives it."""


def create(name: str, **settings: Any) -> Any:
    """Build an attack by name, for example ``create("pgd", eps="8/255")``.

    Args:
        name: a registered name, or ``FILE.py:CLASS``.
        **settings: of the attack.

    Raises:
        UserError: no such attack, or a setting that is unknown or out of range.
    """
    found = entry(name)
    return found.target(**(dict(found.options.get("preset", {})) | settings))


def require_kind(name: str, kind: Kind) -> None:
    """Raise if the attack is of the other kind; the message names the command for it.

    Raises:
        UserError: no such attack, or one of the other kind.
    """
    if kind_of(ATTACKS.get(name)) != kind:
        says = {
            "image": "makes one perturbation for all images: craft it with `gambeson uap craft`",
            "universal": "makes one perturbation per image: run it with `gambeson attack`",
        }
        raise UserError(f"the attack {name!r} {says[kind]}")
