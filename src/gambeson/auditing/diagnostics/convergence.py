"""Convergence of attacks: more budget must not lower the accuracy further."""

from __future__ import annotations

from gambeson.attacks import RandomSearch
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, class_share, register
from gambeson.auditing.diagnostics.gradient_masking import probe
from gambeson.auditing.outcome import InTurn, lower_end
from gambeson.base import eps_text
from gambeson.evaluation.outcome import ImageAttack
from gambeson.tasks import Counts
from gambeson.threat import norm_of_ones

_LEFT = 0.05
_MORE = 3
"""Factor on the suite's steps for the longer attack."""
_CLOSER = 0.01
"""Share of images beyond which it counts what more steps still break: a few always fall (ours)."""


@register(
    "unbounded attack succeeds",
    condition=f"clearly more than {100 * _LEFT:g} % of images stay right under PGD with the whole box allowed, and "
    "under PGD within eps as well; of label maps, clearly more pixels than the rarest class has as well, which stay "
    "right where it is named everywhere",
    explanation="With the whole box allowed any image can become any other: the attack fails for another reason "
    "than the model's robustness (Athalye et al. 2018, section 3.1).",
    remedy="Find what stops the gradient; attack by queries or transfer.",
)
def _whole_box(context: AuditContext) -> Finding:
    eps = norm_of_ones(context.suite.norm, context.test.shape)
    # On label maps, whose steps begin at half of eps: half of the box is too far.
    shorter = {} if context.test.task.per_image_label else {"rel_step_size": 0.1, "final_step": 0.005}
    far = context.pgd_at(eps).model_copy(update={"steps": 40, "restarts": 1, **shorter})
    whole, near = context.outcome(far), context.outcome(context.pgd)
    left = Counts(whole.right.minimum(near.right), whole.total).accuracy
    limit = _LEFT if context.test.task.per_image_label else max(_LEFT, class_share(context, rarest=True))
    return Finding(
        lower_end(left) <= limit,
        f"accuracy under PGD with the whole box allowed {whole.accuracy}, of images that PGD of eps "
        f"{eps_text(context.eps)} leaves too {left}",
        {"accuracy": left.value},
    )


@register(
    "monotone in eps",
    condition="PGD with a larger eps leaves clearly more images right than with a smaller one",
    explanation="The larger ball holds the smaller one: an attack that breaks fewer images in it has failed (Athalye "
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
        f"{context.accuracy(attack)} at eps {eps_text(eps)}" for eps, attack in zip(radii, attacks, strict=True)
    )
    return Finding(
        all(gain.low <= 0 for gain in gains),
        f"accuracy under PGD of {attacks[0].steps} steps: {rates}; a smaller eps breaks "
        f"{max(gains, key=lambda gain: gain.low).beyond()}",
        {f"eps {eps:.4g}": context.accuracy(attack).value for eps, attack in zip(radii, attacks, strict=True)},
    )


@register(
    "attack has converged",
    condition=f"{_MORE} times the steps, or one more restart of PGD, break clearly more images than the strongest of "
    f"the attacks with gradients that every image gets, by {100 * _CLOSER:g} point",
    explanation="The reported accuracy is that of an attack cut short, not of the model (Carlini et al. 2019).",
    remedy="Raise pgd_steps or pgd_restarts of the suite until this number no longer falls.",
    comparisons=2,
)
def _converged(context: AuditContext) -> Finding:
    suite, pgd, usual = context.suite, context.pgd, context.white_box
    longer: ImageAttack = pgd.model_copy(update={"steps": _MORE * pgd.steps, "restarts": 1})
    oftener: ImageAttack = pgd.model_copy(update={"restarts": suite.pgd_restarts + 1})
    if parts := [*context.white_parts.values()]:
        longer = InTurn(*(part.model_copy(update={"steps": _MORE * part.steps}) for part in parts))
        oftener = InTurn(*parts, pgd)
    tried = {f"steps of {_MORE * pgd.steps}": longer, f"restarts of {suite.pgd_restarts + 1}": oftener}
    gains = {key: context.compare(usual, attack, _CLOSER) for key, attack in tried.items()}
    helps = [key for key, gain in gains.items() if gain.low > _CLOSER]
    found = {"reported": context.accuracy(usual)} | {key: context.accuracy(attack) for key, attack in tried.items()}
    rates = ", ".join(f"{key} {rate}" for key, rate in found.items())
    advice = f"; {' and '.join(helps)} would lower the reported number" if helps else ""
    return Finding(
        not helps,
        f"accuracy under {context.strongest} of {pgd.steps} steps, and under more: {rates}; more "
        f"break {max(gains.values(), key=lambda gain: gain.low).beyond(_CLOSER)}{advice}",
        {key: rate.value for key, rate in found.items()},
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
    attack = context.pgd
    queries = 2 * attack.steps * attack.restarts  # a forward and a backward each
    chance = RandomSearch(eps=context.eps, norm=norm, queries=queries)
    gain = context.compare(attack, chance)
    return Finding(
        gain.low <= 0,
        f"accuracy under PGD {context.accuracy(attack)}, under random search of {queries} queries "
        f"{context.accuracy(chance)}: the latter breaks {gain.beyond()}",
        {"pgd": context.accuracy(attack).value, "random": context.accuracy(chance).value},
    )
