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
    return _call_fault(target, _kind(target))


def _call_fault(target: type, kind: Kind | None) -> str | None:
    if kind is None:
        return f"expected {_FORMS['image']}, or {_FORMS['universal']} of UniversalAttack"
    if kind == "image":
        return _binds(target.__call__, 4, ("seed", "task"), _FORMS[kind])
    return _binds(getattr(target, "craft"), 3, ("seed",), _FORMS[kind])  # noqa: B009


def _binds(call: Any, given: int, named: tuple[str, ...], form: str) -> str | None:
    try:
        inspect.signature(call).bind(*(None,) * given, **dict.fromkeys(named))
    except TypeError as error:
        return f"expected {form}, and it has {inspect.signature(call)} ({error})"
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


def require_attack(attack: object) -> Kind:
    """Return what an attack makes, once it can be called as one.

    Args:
        attack: an object of any class, or a function.

    Raises:
        UserError: it is a class, or cannot be called as an attack is.
    """
    if inspect.isclass(attack):
        raise UserError(f"{attack.__name__} is a class: give an attack made from it, as {attack.__name__}(eps=0.1)")
    kind: Kind | None = "image" if inspect.isroutine(attack) else _kind(type(attack))
    if inspect.isroutine(attack):
        fault = _binds(attack, 3, ("seed", "task"), "a function of (model, x, y, *, seed, task)")
    else:
        fault = _call_fault(type(attack), kind)
    if kind is None or fault is not None:
        raise UserError(f"{attack!r} is no attack: {fault}")
    return kind


def name_of(attack: object) -> str:
    """Return the name by which the class of an attack is retrieved; its own name if there is none."""
    return ATTACKS.name_of(type(attack))


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
