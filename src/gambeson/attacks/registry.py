"""Attacks by name: those that perturb image by image, and those that make one perturbation for all."""

from __future__ import annotations

from typing import Any, Literal

from gambeson.attacks.gradient import FGSM, PGD, RFGSM
from gambeson.attacks.universal import StochasticPGD
from gambeson.base import unknown_name

_IMAGE: dict[str, Any] = {
    "fgsm": FGSM,
    "r-fgsm": RFGSM,
    "pgd": PGD,
}
_UNIVERSAL: dict[str, Any] = {
    "stochastic-pgd": StochasticPGD,
}


def names(kind: Literal["image", "universal"]) -> list[str]:
    """Every name of a kind that :func:`create` takes."""
    return list(_IMAGE if kind == "image" else _UNIVERSAL)


def create(name: str, **settings: Any) -> Any:
    """Build an attack by name, for example ``create("pgd", eps="8/255")``.

    Raises:
        UserError: no such attack, or a setting that is unknown or out of range.
    """
    known = _IMAGE | _UNIVERSAL
    if name not in known:
        raise unknown_name("attack", name, known)
    return known[name](**settings)
