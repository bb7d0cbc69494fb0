"""The per-image stage: PGD on every test image (of label maps SegPGD and CosPGD too), and the attack suite on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gambeson.attacks import PGD, CosPGD, SegPGD, Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import PerImageResult
from gambeson.evaluation import run_suite, standard_suite
from gambeson.evaluation.outcome import ImageAttack, outcome
from gambeson.evaluation.segmentation_suite import class_pixels


def left_out(context: AuditContext) -> str:
    """Return why there is no attack suite; empty if there is one."""
    if context.suite.norm != "1":
        return ""
    return "No attack suite was tried on single images: it is for the norms inf and 2."


def measure(context: AuditContext) -> list[PerImageResult]:
    """Run the per-image attacks at the middle eps.

    PGD on all test images, and where labels are maps SegPGD and CosPGD of as many steps and restarts, then the standard
    attack suite on ``suite.suite_images`` of them. The suite needs the norms inf or 2. A black box is attacked only by
    Square, on the sample of the diagnostics, with ``suite.queries`` per image, and not at all in the norm 1.
    """
    suite, norm = context.suite, context.suite.norm
    possible = not left_out(context)
    if context.subject.black_box:
        if not possible or suite.queries == 0:
            return []
        square = Square(eps=context.eps, norm=norm, queries=suite.queries)
        return [_suite(context, "square", len(context.sample), {"square": square}, square.plain())]
    task, found = context.test.task, [_single(context, "pgd", suite.pgd(context.eps))]
    if not task.per_image_label and norm != "1":
        same = {"eps": context.eps, "norm": norm, "steps": suite.pgd_steps, "restarts": suite.pgd_restarts}
        found += [_single(context, "segpgd", SegPGD(**same)), _single(context, "cospgd", CosPGD(**same))]
    if possible and suite.suite_images:
        attacks = standard_suite(
            eps=context.eps,
            norm=norm,
            queries=suite.suite_queries if task.per_image_label else None,
            eot_samples=suite.eot_samples if context.subject.random else None,
            task=task,
            class_pixels=None if task.per_image_label else class_pixels(context.data.train),
        )
        settings = {name: attack.plain() for name, attack in attacks.items() if hasattr(attack, "plain")}
        found.append(_suite(context, "standard", suite.suite_images, attacks, settings))
    return found


def _single(context: AuditContext, name: str, attack: PGD) -> PerImageResult:
    before = context.spent
    found = outcome(context.victim, context.test, context.averaged(attack), context.seed)
    context.outcomes.keep(f"per_image:{name}", found, context.test)
    return PerImageResult(
        attack=name,
        settings=attack.plain(),
        eps=context.eps,
        norm=context.suite.norm,
        accuracy=found.accuracy,
        cost=context.since(before),
    )


def _suite(
    context: AuditContext, name: str, images: int, attacks: Mapping[str, ImageAttack], settings: dict[str, Any]
) -> PerImageResult:
    before = context.spent
    rows = context.test.sample_indices(images, seed=context.seed)
    suite = run_suite(context.victim, context.few(images), attacks, norm=context.suite.norm, seed=context.seed)
    context.outcomes.keep(f"per_image:{name}", suite.counts, context.test, rows)
    found = suite.result
    return PerImageResult(
        attack=name,
        settings=settings,
        eps=context.eps,
        norm=context.suite.norm,
        accuracy=found.robust,
        rounds=found.rounds,
        maps=found.maps,
        cost=context.since(before),
    )
