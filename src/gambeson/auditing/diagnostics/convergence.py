"""Attacks that have not done all they could: more budget would lower the accuracy further."""

from __future__ import annotations

import math

from gambeson.attacks import PGD, RandomSearch
from gambeson.auditing.context import Evidence
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.diagnostics.gradient_masking import probe
from gambeson.auditing.outcome import Gain

_LEFT = 0.05
_MORE = 3
"""How many times the suite's steps the longer attack takes."""


@register(
    "unbounded attack succeeds",
    condition=f"with the whole box allowed, clearly more than {100 * _LEFT:g} % of images stay right",
    explanation="With the whole box allowed every image can be made anything: the attack fails for another reason "
    "than the model's robustness (Athalye et al. 2018, section 3.1).",
    remedy="Find what stops the gradient; attack by queries or transfer.",
)
def _whole_box(evidence: Evidence) -> Finding:
    norm, values = evidence.suite.norm, math.prod(evidence.test.shape)
    eps = {"inf": 1.0, "2": math.sqrt(values), "1": float(values)}[norm]
    left = evidence.accuracy(PGD(eps=eps, norm=norm, steps=40))
    return Finding(
        left.low <= _LEFT, f"accuracy under PGD with the whole box allowed: {left}", {"accuracy": left.value}
    )


@register(
    "more eps, more errors",
    condition="PGD with a larger eps leaves clearly more images right than with a smaller one",
    explanation="The larger ball holds the smaller one: an attack that does less in it has lost its way (Athalye "
    "et al. 2018, section 3.1).",
    remedy="Take more and smaller steps; look at the gradients' diagnostics.",
)
def _falls(evidence: Evidence) -> Finding:
    grid = evidence.suite.eps
    radii = sorted({grid[0], evidence.eps, grid[-1]})
    if len(radii) == 1:
        return Finding(None, "the suite has one eps alone")
    attacks = [probe(evidence, eps) for eps in radii]
    gains = [
        Gain.of(evidence.outcome(large), evidence.outcome(small))
        for k, small in enumerate(attacks)
        for large in attacks[k + 1 :]
    ]
    rates = ", ".join(
        f"{evidence.accuracy(attack)} at eps {eps:.4g}" for eps, attack in zip(radii, attacks, strict=True)
    )
    return Finding(
        all(gain.low <= 0 for gain in gains),
        f"accuracy under PGD of {attacks[0].steps} steps: {rates}",
        {f"eps {eps:.4g}": evidence.accuracy(attack).value for eps, attack in zip(radii, attacks, strict=True)},
    )


@register(
    "attack has converged",
    condition=f"PGD of {_MORE} times the steps, or of one more restart, breaks clearly more images than the suite's",
    explanation="The reported accuracy is that of an attack cut short, not of the model (Carlini et al. 2019).",
    remedy="Raise pgd_steps or pgd_restarts of the suite until this number stands still.",
)
def _converged(evidence: Evidence) -> Finding:
    suite = evidence.suite
    usual = suite.pgd(evidence.eps)
    longer = usual.model_copy(update={"steps": _MORE * suite.pgd_steps, "restarts": 1})
    oftener = usual.model_copy(update={"restarts": suite.pgd_restarts + 1})
    helps = []
    for attack, setting in ((longer, f"steps of {longer.steps}"), (oftener, f"restarts of {oftener.restarts}")):
        if Gain.of(evidence.outcome(usual), evidence.outcome(attack)).low > 0:
            helps.append(setting)
    found = {
        "reported": evidence.accuracy(usual),
        f"{longer.steps} steps": evidence.accuracy(longer),
        f"{oftener.restarts} restarts": evidence.accuracy(oftener),
    }
    rates = ", ".join(f"{name} {rate}" for name, rate in found.items())
    advice = f"; {' and '.join(helps)} would lower the reported number" if helps else ""
    return Finding(
        not helps,
        f"accuracy under PGD of {usual.steps} steps and {usual.restarts} restarts and of more: {rates}{advice}",
        {name: rate.value for name, rate in found.items()},
    )


@register(
    "gradient beats chance",
    condition="random search breaks clearly more images than PGD at as many passes",
    explanation="Following the gradient is worse than guessing: it does not point where the loss rises "
    "(Athalye et al. 2018, section 3.1).",
    remedy="Distrust gradient attacks on this model; attack it by queries or transfer.",
)
def _beats_chance(evidence: Evidence) -> Finding:
    norm = evidence.suite.norm
    if norm == "1":
        return Finding(None, "random search is for the norms inf and 2")
    if evidence.sample.labels.ndim > 1:
        return Finding(None, "random search is for one label an image")
    attack = evidence.suite.pgd(evidence.eps)
    queries = 2 * attack.steps * attack.restarts  # a forward and a backward each
    chance = RandomSearch(eps=evidence.eps, norm=norm, queries=queries)
    gain = Gain.of(evidence.outcome(attack), evidence.outcome(chance))
    return Finding(
        gain.low <= 0,
        f"accuracy under PGD {evidence.accuracy(attack)}, under random search of {queries} queries "
        f"{evidence.accuracy(chance)}",
        {"pgd": evidence.accuracy(attack).value, "random": evidence.accuracy(chance).value},
    )
