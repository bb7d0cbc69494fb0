"""The per-image stage: PGD on every test image, and the standard attack suite on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gambeson.attacks import Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import PerImageResult
from gambeson.evaluation import run_suite, standard_suite
from gambeson.evaluation.outcome import ImageAttack, accuracy_under


def left_out(context: AuditContext) -> str:
    """Return why there is no attack suite; empty if there is one."""
    if context.suite.norm != "1" and context.test.task.per_image_label:
        return ""
    return "No attack suite was tried on single images: it is for one label per image and the norms inf and 2."


def measure(context: AuditContext) -> list[PerImageResult]:
    """Run the per-image attacks at the middle eps.

    PGD on all test images, then the standard attack suite on ``suite.suite_images`` of them. The suite needs one label
    per image and the norms inf or 2. A black box is attacked only by Square, on the sample of the diagnostics, with
    ``suite.queries`` per image, and not at all in the norm 1.
    """
    suite, norm = context.suite, context.suite.norm
    possible = not left_out(context)
    if context.subject.black_box:
        if not possible or suite.queries == 0:
            return []
        square = Square(eps=context.eps, norm=norm, queries=suite.queries)
        return [_suite(context, "square", len(context.sample), {"square": square}, square.plain())]
    found = [_pgd(context)]
    if possible and suite.suite_images:
        attacks = standard_suite(
            eps=context.eps,
            norm=norm,
            queries=suite.suite_queries,
            eot_samples=suite.eot_samples if context.subject.random else None,
        )
        settings = {name: attack.plain() for name, attack in attacks.items() if hasattr(attack, "plain")}
        found.append(_suite(context, "standard", suite.suite_images, attacks, settings))
    return found


def _pgd(context: AuditContext) -> PerImageResult:
    before = context.spent
    attack = context.suite.pgd(context.eps)
    return PerImageResult(
        attack="pgd",
        settings=attack.plain(),
        eps=context.eps,
        norm=context.suite.norm,
        accuracy=accuracy_under(context.victim, context.test, context.averaged(attack), context.seed),
        cost=context.since(before),
    )


def _suite(
    context: AuditContext, name: str, images: int, attacks: Mapping[str, ImageAttack], settings: dict[str, Any]
) -> PerImageResult:
    before = context.spent
    split = context.few(images)
    found = run_suite(context.victim, split, attacks, norm=context.suite.norm, seed=context.seed).result
    return PerImageResult(
        attack=name,
        settings=settings,
        eps=context.eps,
        norm=context.suite.norm,
        accuracy=found.robust,
        rounds=found.rounds,
        cost=context.since(before),
    )
