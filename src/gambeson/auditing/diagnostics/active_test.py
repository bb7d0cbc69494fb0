"""Active tests: attacks on copies of the model whose robust accuracy is known (Zimmermann et al. 2022)."""

from __future__ import annotations

from gambeson.attacks import AutoPGD, Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import findable_share, lower_end
from gambeson.base import UserError
from gambeson.evaluation import BinarizationTest, BudgetSpent, binarization_tests
from gambeson.evaluation.binarization import STRONG
from gambeson.evaluation.outcome import ImageAttack

_COPIES, _INNER, _GUESSES = 24, 200, 50
"""Copies, points of class 0 and random points of each (ours): 24 copies tell an attack that misses four in ten, and
200 points ask a tenth of a quick audit's forwards at the most."""
_FEWEST = 10
"""Copies on which luck finds nothing, below which the test says nothing (ours)."""


@register(
    "attacks find what is there",
    condition=f"on copies of the model with two classes, which have an adversarial example each that random points do "
    f"not find, the strongest attack with gradients clearly misses more than {100 - 100 * STRONG:g} %; or an attack "
    "succeeds on a copy that has none",
    explanation="The attack is too weak for this model: it does not find what is known to be there (Zimmermann et al. "
    "2022), so that what it leaves right is no sign of robustness.",
    remedy="Attack what the gradient does not lead to by queries, by transfer, or with a smooth stand-in for the part "
    "that hides it, until the attack passes.",
)
def _finds(context: AuditContext) -> Finding:
    suite, task = context.suite, context.sample.task
    if not task.per_image_label:
        return Finding(None, "the copies have one label per image, and labels are maps")
    ball = {"eps": context.eps, "norm": suite.norm}
    attacks: dict[str, ImageAttack] = {"PGD": context.averaged(context.pgd)}
    attacks[context.strongest] = context.averaged(context.white_box)
    if suite.norm != "1" and suite.suite_images:
        attacks["Auto-PGD"] = context.averaged(AutoPGD(steps=100, **ball))
    if suite.norm != "1" and suite.queries and not context.subject.random:
        attacks["Square"] = Square(queries=suite.queries, **ball)
    test = BinarizationTest(samples=_COPIES, inner=_INNER, random_points=_GUESSES, **ball)
    try:
        found = binarization_tests(context.victim, context.sample, attacks, test, seed=context.seed)
    except BudgetSpent:
        raise
    except UserError as error:
        return Finding(None, str(error))
    judged = found[context.strongest]
    again = (len(found) - 1) * judged.shared.forwards
    context.victim.forwards += sum(one.cost.forwards for one in found.values()) - again
    context.victim.backwards += sum(one.cost.backwards for one in found.values())
    copies = judged.hidden.n
    rates = ", ".join(f"{name} finds {round(one.hidden.value * copies)}" for name, one in found.items())
    said = f"of {copies} copies with an adversarial example that {2 * _GUESSES} random points do not find, {rates}"
    left_out = f"{judged.success.n - copies} more were found by chance, and {judged.failed} could not be made"
    numbers = {name: one.hidden.value for name, one in found.items() if copies}
    claimed = sum(one.claimed for one in found.values())
    if copies < _FEWEST and not claimed:
        return Finding(None, f"not informative: {said}; {left_out}", numbers)
    limit = 1 - STRONG
    missed = lower_end(judged.hidden.complement)
    power = findable_share(copies, limit)
    return Finding(
        missed <= limit and not claimed,
        f"{said}; {left_out}; {context.strongest} misses {'' if missed > limit else 'not '}clearly more than "
        f"{100 * limit:g} % ({100 * power:.0f} % would be found with 80 % power); on copies without any, {claimed} "
        "successes were claimed",
        numbers | {"copies": copies, "claimed": claimed},
    )
