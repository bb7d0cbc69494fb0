"""Additional attacks of an audit: named by the suite, or given as objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gambeson import attacks
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import PerImageResult, TransferredResult
from gambeson.auditing.stages.per_image import attacked
from gambeson.auditing.suite import Suite
from gambeson.base import UserError, user_code
from gambeson.evaluation.outcome import outcome_under


@dataclass(frozen=True)
class Own:
    """A stage that runs one attack."""

    attack: Any
    run: Callable[[AuditContext], PerImageResult | TransferredResult]
    described: bool = True
    """Whether its settings are known, so that a stored result is known to be of this attack."""


def of(suite: Suite, given: Sequence[Any] = ()) -> dict[str, Own]:
    """Return a stage for each attack, by the attack's name and settings.

    Args:
        suite: whose ``attacks`` are built at its middle eps and its norm.
        given: attacks with their own eps, or functions.

    Raises:
        UserError: one is no attack, or two are the same.
    """
    if not isinstance(given, Sequence):
        raise UserError(f"attacks is a {type(given).__name__}: give a list of attacks")
    eps = suite.eps[len(suite.eps) // 2] if suite.eps else 0.0
    found: dict[str, Own] = {}
    built = [_built(name, eps, suite.norm) for name in suite.attacks]
    for place, attack in enumerate([*built, *given]):
        kind = attacks.require_attack(attack)
        name = attack.__name__ if inspect.isroutine(attack) else user_code.short(attacks.name_of(attack))
        settings = attack.plain() if hasattr(attack, "plain") else {}
        key = f"attack {name} {settings}"
        if key in found:
            raise UserError(f"the attack {name} was given twice with the same settings: give it once")
        stage = _image(attack, name, settings) if kind == "image" else _universal(attack, name)
        found[key] = replace(stage, described=place < len(built) or hasattr(attack, "plain"))
    return found


def _built(name: str, eps: float, norm: str) -> Any:
    settings = attacks.entry(name).settings
    return attacks.create(name, **{key: value for key, value in (("eps", eps), ("norm", norm)) if key in settings})


def _image(attack: Any, name: str, settings: dict[str, Any]) -> Own:
    def run(context: AuditContext) -> PerImageResult:
        return attacked(context, name, context.averaged(attack), settings)

    return Own(attack, run)


def _universal(attack: Any, name: str) -> Own:
    if isinstance(attack, attacks.UniversalPatch):
        raise UserError(
            f"the attack {name!r} makes a patch, and audits are about norm balls: craft it with `gambeson uap craft`, "
            "and score it with `gambeson uap score --placements`"
        )

    def run(context: AuditContext) -> TransferredResult:
        before = context.spent
        with user_code.blamed(attack, f"the attack {name!r}"):
            uap = attack.craft(context.victim, context.data, seed=context.seed)
        if not isinstance(uap, UniversalPerturbation):
            raise UserError(f"the attack {name!r} returned a {type(uap).__name__}: expected a UniversalPerturbation")
        left = uap.held_out(context.test)
        return TransferredResult(
            source=name,
            attack=name,
            universal=True,
            eps=uap.about.eps,
            norm=uap.about.norm,
            error=outcome_under(context.victim, left, uap.delta, seed=context.seed).accuracy.complement,
            cost=context.since(before),
        )

    return Own(attack, run)
