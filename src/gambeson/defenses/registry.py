"""Defences by the name their papers give them."""

from __future__ import annotations

from typing import Any

from gambeson.base import unknown_name
from gambeson.defenses.adp import ADP
from gambeson.defenses.combination import Combination
from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial
from gambeson.defenses.gal import GAL
from gambeson.defenses.jacobian import Jacobian
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.defenses.learn2perturb import Learn2Perturb
from gambeson.defenses.objective import Defense
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.defenses.pni import PNI
from gambeson.defenses.rse import RSE
from gambeson.defenses.shared_adversarial import SharedAdversarial
from gambeson.defenses.standard import Standard
from gambeson.defenses.trades import Trades
from gambeson.defenses.trs import TRS
from gambeson.defenses.universal_adversarial import UniversalAdversarial
from gambeson.defenses.universal_consistency import UniversalConsistency
from gambeson.defenses.voters import Ensemble

_DEFENSES: dict[str, type[Defense]] = {
    "standard": Standard,
    "pgd-adversarial": PGDAdversarial,
    "trades": Trades,
    "shared-adversarial": SharedAdversarial,
    "universal-adversarial": UniversalAdversarial,
    "universal-consistency": UniversalConsistency,
    "ensemble-adversarial": EnsembleAdversarial,
    "jacobian": Jacobian,
    "learn2perturb": Learn2Perturb,
    "pni": PNI,
    "rse": RSE,
    "ensemble": Ensemble,
    "jacobian-ensemble": JacobianEnsemble,
    "adp": ADP,
    "gal": GAL,
    "trs": TRS,
    "combination": Combination,
}


def names() -> list[str]:
    """Every name that :func:`create` takes."""
    return list(_DEFENSES)


def create(name: str, **settings: Any) -> Defense:
    """Build a defence by name, for example ``create("shared-adversarial", eps="8/255")``.

    Raises:
        UserError: no such defence, or a value out of range.
        TypeError: a setting is missing or unknown.
    """
    return _kind(name)(**settings)


def needs_eps(name: str) -> bool:
    """Whether a defence cannot be built without an eps."""
    field = _kind(name).model_fields.get("eps")
    return field is not None and field.is_required()


def name_of(defense: Defense) -> str:
    """The name under which a defence is registered; its class's name for a user's own."""
    return next((name for name, kind in _DEFENSES.items() if kind is type(defense)), type(defense).__name__)


def _kind(name: str) -> type[Defense]:
    if name not in _DEFENSES:
        raise unknown_name("defence", name, _DEFENSES)
    return _DEFENSES[name]
