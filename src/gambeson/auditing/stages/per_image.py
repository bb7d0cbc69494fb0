"""The per-image stage: PGD on every test image (of label maps SegPGD and CosPGD too), and the attack suite on some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from gambeson.attacks import PGD, CosPGD, SegPGD, Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.rescoring import Perturbed, asked, rescored_in, ways, worse
from gambeson.auditing.results import PerImageResult, Rescored
from gambeson.evaluation import BudgetSpent, Rate, run_suite, standard_suite
from gambeson.evaluation.outcome import ImageAttack, outcome
from gambeson.evaluation.segmentation_suite import class_pixels
from gambeson.tasks import Counts
from gambeson.victim import score, score_batches

PGD_NAME = "pgd"


def left_out(context: AuditContext) -> str:
    """Return why there is no attack suite; empty if there is one."""
    if context.suite.norm != "1":
        return ""
    return "No per-image attack suite was tried: it is for the norms inf and 2."


def measure(context: AuditContext) -> list[PerImageResult]:
    """Run the per-image attacks at the middle eps.

    PGD on all test images, then targeted Auto-PGD behind a short PGD (:meth:`Suite.white_box`; random models are spared
    it), or where labels are maps SegPGD and CosPGD of as many steps and restarts as PGD; then the standard attack suite
    on ``suite.suite_images`` of them. The suite needs the norms inf or 2. A black box is attacked only by Square, on
    the sample of the diagnostics, with ``suite.queries`` per image, and not at all in the norm 1.
    """
    suite, norm = context.suite, context.suite.norm
    possible = not left_out(context)
    if context.subject.black_box:
        if not possible or suite.queries == 0:
            return []
        square = Square(eps=context.eps, norm=norm, queries=suite.queries)
        return [attacked_in_turn(context, "square", len(context.sample), {"square": square}, square.plain())]
    task, found = context.test.task, [_single(context, PGD_NAME, suite.pgd(context.eps))]
    if parts := context.white_parts:
        settings = {name: attack.plain() for name, attack in parts.items()}
        found.append(attacked_in_turn(context, "auto-pgd-targeted", len(context.test), parts, settings))
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
        with suppress(BudgetSpent):  # where the time is over, PGD's number stays
            found.append(attacked_in_turn(context, "standard", suite.suite_images, attacks, settings))
    return found


def _single(context: AuditContext, name: str, attack: PGD) -> PerImageResult:
    return attacked(context, name, context.averaged(attack), attack.plain())


def attacked(context: AuditContext, name: str, attack: ImageAttack, settings: dict[str, Any]) -> PerImageResult:
    """Attack every test image by its own, and ask again in other ways for what the attack returned."""
    before, test, eps, norm = context.spent, context.test, context.eps, context.suite.norm
    at = getattr(attack, "eps", eps), getattr(attack, "norm", norm)
    rows = test.sample_indices(max(1, _KEPT // math.prod(test.shape)), seed=context.seed)
    stored, moved, wanted = at == (eps, norm), list[torch.Tensor](), iter(_marked(rows, len(test)))

    def keep(images: torch.Tensor) -> None:
        moved.append(images[torch.stack([next(wanted) for _ in images]).to(images.device)].cpu())

    right = outcome(context.victim, test, attack, context.seed, keep=keep if stored else None)
    if name not in {one.attack for one in context.per_image}:  # the suite's own comes first
        context.outcomes.keep(f"per_image:{name}", right, test)
    cost, accuracy, found = context.since(before), right.accuracy, list[Rescored]()
    if stored:
        part = test if len(rows) == len(test) else test.subset(rows)
        kept = Perturbed(split=part, right=Counts(right.right[rows], right.total[rows]), images=torch.cat(moved))
        found, accuracy = _again(context, kept, accuracy)
    return PerImageResult(
        attack=name, settings=settings, eps=at[0], norm=at[1], accuracy=accuracy, rescored=found, cost=cost
    )


def _marked(rows: torch.Tensor, count: int) -> torch.Tensor:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[rows] = True
    return marks


_KEPT = 2**27
"""Values of perturbed images that are kept to be asked for again, half a gigabyte."""


def _again(context: AuditContext, stored: Perturbed, reported: Rate) -> tuple[list[Rescored], Rate]:
    """Ask again in other ways, and return what was found, and the lowest of the accuracy as reported and in these."""
    tried = ways(context)
    found = rescored_in(context, stored, tried)
    again = [score(asked(context, stored, way), stored.split).counts.accuracy for way in worse(found, tried)]
    return found, Rate.lowest([reported, *again]) if again else reported


def attacked_in_turn(
    context: AuditContext, name: str, images: int, attacks: Mapping[str, ImageAttack], settings: dict[str, Any]
) -> PerImageResult:
    """Run a suite of attacks on a sample of the test images, and ask again in other ways for its worst cases."""
    before = context.spent
    rows, split = context.test.sample_indices(images, seed=context.seed), context.few(images)
    run = run_suite(context.victim, split, attacks, norm=context.suite.norm, seed=context.seed)
    found, cost = run.result, context.since(before)
    context.outcomes.keep(f"per_image:{name}", run.counts, context.test, rows)
    right = score_batches(context.victim, split.with_images(run.images), seed=context.seed).counts
    again, accuracy = _again(context, Perturbed(split=split, right=right, images=run.images), found.robust)
    return PerImageResult(
        attack=name,
        settings=settings,
        eps=context.eps,
        norm=context.suite.norm,
        accuracy=accuracy,
        rounds=found.rounds,
        maps=found.maps,
        rescored=again,
        cost=cost,
    )
