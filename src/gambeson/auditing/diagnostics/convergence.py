"""Convergence of attacks: more budget must not lower the accuracy further."""

from __future__ import annotations

import math

from gambeson.attacks import PGD, RandomSearch
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.diagnostics.gradient_masking import probe
from gambeson.auditing.outcome import lower_end

_LEFT = 0.05
_MORE = 3
"""Factor on the suite's steps for the longer attack."""
_CLOSER = 0.01
"""Share of images beyond which it counts what more steps still break: a few always fall (ours)."""


@register(
    "unbounded attack succeeds",
    condition=f"with the whole box allowed, clearly more than {100 * _LEFT:g} % of images stay right",
    explanation="With the whole box allowed every image can be made anything: the attack fails for another reason "
    "than the model's robustness (Athalye et al. 2018, section 3.1).",
    remedy="Find what stops the gradient; attack by queries or transfer.",
)
def _whole_box(context: AuditContext) -> Finding:
    norm, values = context.suite.norm, math.prod(context.test.shape)
    eps = {"inf": 1.0, "2": math.sqrt(values), "1": float(values)}[norm]
    left = context.accuracy(PGD(eps=eps, norm=norm, steps=40))
    return Finding(
        lower_end(left) <= _LEFT, f"accuracy under PGD with the whole box allowed: {left}", {"accuracy": left.value}
    )


@register(
    "monotone in eps",
    condition="PGD with a larger eps leaves clearly more images right than with a smaller one",
    explanation="The larger ball holds the smaller one: an attack that does less in it has lost its way (Athalye "
    "et al. 2018, section 3.1).",
    remedy="Take more and smaller steps; look at the gradients' diagnostics.",
    comparisons=3,
)
def _falls(context: AuditContext) -> Finding:
    grid = context.suite.eps
    radii = sorted({grid[0], context.eps, grid[-1]})
    if len(radii) == 1:
        return Finding(None, "the suite has one eps alone")
    attacks = [probe(context, eps) for eps in radii]
    gains = [context.compare(large, small) for k, small in enumerate(attacks) for large in attacks[k + 1 :]]
    rates = ", ".join(
        f"{context.accuracy(attack)} at eps {eps:.4g}" for eps, attack in zip(radii, attacks, strict=True)
    )
    return Finding(
        all(gain.low <= 0 for gain in gains),
        f"accuracy under PGD of {attacks[0].steps} steps: {rates}; a smaller eps breaks "
        f"{max(gains, key=lambda gain: gain.low).beyond()}",
        {f"eps {eps:.4g}": context.accuracy(attack).value for eps, attack in zip(radii, attacks, strict=True)},
    )


@register(
    "attack has converged",
    condition=f"PGD of {_MORE} times the steps, or of one more restart, breaks clearly more images than the suite's, "
    f"by {100 * _CLOSER:g} point",
    explanation="The reported accuracy is that of an attack cut short, not of the model (Carlini et al. 2019).",
    remedy="Raise pgd_steps or pgd_restarts of the suite until this number stands still.",
    comparisons=2,
)
def _converged(context: AuditContext) -> Finding:
    suite = context.suite
    usual = suite.pgd(context.eps)
    longer = usual.model_copy(update={"steps": _MORE * suite.pgd_steps, "restarts": 1})
    oftener = usual.model_copy(update={"restarts": suite.pgd_restarts + 1})
    helps, gains = [], []
    for attack, setting in ((longer, f"steps of {longer.steps}"), (oftener, f"restarts of {oftener.restarts}")):
        gains.append(context.compare(usual, attack, _CLOSER))
        if gains[-1].low > _CLOSER:
            helps.append(setting)
    found = {
        "reported": context.accuracy(usual),
        f"{longer.steps} steps": context.accuracy(longer),
        f"{oftener.restarts} restarts": context.accuracy(oftener),
    }
    rates = ", ".join(f"{name} {rate}" for name, rate in found.items())
    advice = f"; {' and '.join(helps)} would lower the reported number" if helps else ""
    return Finding(
        not helps,
        f"accuracy under PGD of {usual.steps} steps and {usual.restarts} restarts and of more: {rates}; "
        f"more break {max(gains, key=lambda gain: gain.low).beyond(_CLOSER)}{advice}",
        {name: rate.value for name, rate in found.items()},
    )


@register(
    "gradient beats random search",
    condition="random search breaks clearly more images than PGD at as many passes",
    explanation="Following the gradient is worse than guessing: it does not point where the loss rises "
    "(Athalye et al. 2018, section 3.1).",
    remedy="Distrust gradient attacks on this model; attack it by queries or transfer.",
)
def _beats_chance(context: AuditContext) -> Finding:
    norm = context.suite.norm
    if norm == "1":
        return Finding(None, "random search is for the norms inf and 2")
    attack = context.suite.pgd(context.eps)
    queries = 2 * attack.steps * attack.restarts  # a forward and a backward each
    chance = RandomSearch(eps=context.eps, norm=norm, queries=queries)
    gain = context.compare(attack, chance)
    return Finding(
        gain.low <= 0,
        f"accuracy under PGD {context.accuracy(attack)}, under random search of {queries} queries "
        f"{context.accuracy(chance)}: the latter breaks {gain.beyond()}",
        {"pgd": context.accuracy(attack).value, "random": context.accuracy(chance).value},
    )
