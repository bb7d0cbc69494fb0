"""The per-image stage: PGD on every test image (of label maps CosPGD too), and the attack suite on some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from gambeson.attacks import PGD, GradientAttack, Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.rescoring import Perturbed, asked, rescored_in, ways, worse
from gambeson.auditing.results import PerImageResult, Rescored
from gambeson.auditing.stages.randomness import QUIET, NoiseOff, way_to_quiet
from gambeson.auditing.suite import Suite
from gambeson.data import Dataset, Split
from gambeson.evaluation import BudgetSpent, Rate, run_suite
from gambeson.evaluation.attack_suite import suite_for
from gambeson.evaluation.outcome import ImageAttack, outcome
from gambeson.tasks import Counts
from gambeson.threat import perturb
from gambeson.victim import score, score_batches

PGD_NAME = "pgd"


def left_out(context: AuditContext) -> str:
    """Return why there is no attack suite; empty if there is one."""
    if context.suite.norm != "1":
        return ""
    return "No per-image attack suite was tried: it is for the norms inf and 2."


def names(suite: Suite, data: Dataset, *, black_box: bool) -> list[str]:
    """Return what the attacks of :func:`measure`, and those that checks may call for, are named in results."""
    possible, maps = suite.norm != "1", not data.test.task.per_image_label
    if black_box:
        return ["square"] if possible and suite.queries else []
    found = {
        PGD_NAME: True,
        "auto-pgd-targeted": possible and not maps and suite.auto_pgd,
        "cospgd": possible and maps,
        "standard": possible and suite.suite_images > 0,
        "adaptive": True,
    }
    return [name for name, tried in found.items() if tried]


def measure(context: AuditContext) -> list[PerImageResult]:
    """Run the per-image attacks at the middle eps.

    PGD on all test images; then, on what that and the universal perturbation left, targeted Auto-PGD, or where labels
    are maps CosPGD, of which the worst per image counts; then the standard attack suite on ``suite.suite_images`` of
    them, which begins from what those left. The suite needs the norms inf or 2. A black box is attacked only by Square,
    on the sample of the diagnostics, with ``suite.queries`` per image, and not at all in the norm 1.

    On a random model targeted Auto-PGD is run with the noise off, where it can be turned off, and through its draws.
    Of what they and PGD found the worst is chosen by votes, and scored on other votes: attacks that do nothing
    change nothing, however many they are (:func:`gambeson.evaluation.run_suite`).
    """
    suite, norm = context.suite, context.suite.norm
    possible = not left_out(context)
    if context.subject.black_box:
        if not possible or suite.queries == 0:
            return []
        square = Square(eps=context.eps, norm=norm, queries=suite.queries)
        return [attacked_in_turn(context, "square", len(context.sample), {"square": square}, square.plain())]
    task, earlier = context.test.task, _universal(context)
    found = [_single(context, PGD_NAME, context.pgd, earlier)]
    if parts := _targeted(context):
        settings = {name: attack.plain() for name, attack in parts.items()}
        found.append(attacked_in_turn(context, "auto-pgd-targeted", len(context.test), parts, settings, earlier))
    if not task.per_image_label and norm != "1":
        attack = suite.cospgd(context.eps)
        turns = {"cospgd": context.averaged(attack)}
        found.append(attacked_in_turn(context, "cospgd", len(context.test), turns, attack.plain(), earlier))
    if possible and suite.suite_images:
        attacks = suite_for(
            context.data,
            seed=context.seed,
            eps=context.eps,
            norm=norm,
            queries=suite.suite_queries if task.per_image_label else None,
            eot_samples=suite.eot_samples if context.subject.random else None,
        )
        settings = {name: attack.plain() for name, attack in attacks.items() if hasattr(attack, "plain")}
        with suppress(BudgetSpent):  # where the time is over, PGD's number stays
            found.append(attacked_in_turn(context, "standard", suite.suite_images, attacks, settings, earlier))
    return found


def _universal(context: AuditContext) -> dict[str, Moved]:
    """Return what the universal perturbation makes of the test images, since it is one of each image's as well."""
    found = context.uaps.get(context.eps)
    if found is None:
        return {}
    rows = _kept(context)
    return {"universal": (rows, perturb(context.test.take(rows, "cpu")[0], found.delta.cpu()))}


def _targeted(context: AuditContext) -> dict[str, GradientAttack | NoiseOff]:
    """Return the attacks that go on from what PGD left: targeted Auto-PGD, of a random model with its noise off too."""
    eps, name = context.eps, "auto-pgd-targeted"
    if not context.targets_classes:
        return {}
    alone, random = context.suite.targeted_auto_pgd(eps), context.subject.random
    how = way_to_quiet(context) if random else ""
    off = {"noise off": NoiseOff(how, alone)} if how in QUIET else {}
    return {**off, name: context.suite.targeted_auto_pgd(eps, random=True) if random else alone}


Moved = tuple[torch.Tensor, torch.Tensor]
"""Which test images (M,), and what an attack made of them (M, C, H, W)."""


def _single(context: AuditContext, name: str, attack: PGD, into: dict[str, Moved]) -> PerImageResult:
    return attacked(context, name, context.averaged(attack), attack.plain(), into)


def attacked(
    context: AuditContext,
    name: str,
    attack: ImageAttack,
    settings: dict[str, Any],
    into: dict[str, Moved] | None = None,
) -> PerImageResult:
    """Attack every test image by its own, and ask again in other ways for what the attack returned.

    What it returned is added to ``into``, for attacks that go on from there.
    """
    before, test, eps, norm = context.spent, context.test, context.eps, context.suite.norm
    at = getattr(attack, "eps", eps), getattr(attack, "norm", norm)
    rows = _kept(context)
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
        if into is not None:
            into[f"earlier {name}"] = rows, torch.cat(moved)
    return PerImageResult(
        attack=name, settings=settings, eps=at[0], norm=at[1], accuracy=accuracy, rescored=found, cost=cost
    )


def _placed(split: Split, rows: torch.Tensor, places: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return what an attack made of the images of a split, which are ``rows`` of test; clean where it made nothing."""
    images = split.take(slice(None), "cpu")[0].clone()
    where = {int(place): k for k, place in enumerate(places)}
    pairs = [(k, where[int(row)]) for k, row in enumerate(rows) if int(row) in where]
    if pairs:
        to, of = torch.tensor(pairs).T
        images[to] = moved[of]
    return images


def _kept(context: AuditContext) -> torch.Tensor:
    """Return which test images are kept as attacks leave them: all, unless they are too many."""
    return context.test.sample_indices(max(1, _KEPT // math.prod(context.test.shape)), seed=context.seed)


def _marked(rows: torch.Tensor, count: int) -> torch.Tensor:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[rows] = True
    return marks


_KEPT = 2**27
"""Values of perturbed images that are kept to be asked for again, half a gigabyte."""


def _again(context: AuditContext, stored: Perturbed, reported: Rate) -> tuple[list[Rescored], Rate]:
    """Ask again in other ways, and return what was found, and the accuracy: as reported, or the lowest in these."""
    tried = ways(context)
    found = rescored_in(context, stored, tried)
    again = [score(asked(context, stored, way), stored.split).counts.accuracy for way in worse(found, tried)]
    return found, lowered(reported, stored.right.accuracy, again)


def lowered(reported: Rate, kept: Rate, again: Sequence[Rate]) -> Rate:
    """Return the lowest accuracy of images that were asked again, if it is lower than before; else what was reported.

    Where fewer images were kept than reported of, "before" is their own accuracy: that they stand better or worse than
    all is chance.

    Args:
        reported: the accuracy that was reported.
        kept: the accuracy, as reported, of the images that were asked again.
        again: their accuracy in each other way.
    """
    if kept.n == reported.n:
        kept = reported
    if not again or (kept is not reported and min(rate.value for rate in again) >= kept.value):
        return reported
    return Rate.lowest([kept, *again])


def attacked_in_turn(
    context: AuditContext,
    name: str,
    images: int,
    attacks: Mapping[str, ImageAttack],
    settings: dict[str, Any],
    earlier: dict[str, Moved] | None = None,
) -> PerImageResult:
    """Run a suite of attacks on a sample of the test images, and ask again in other ways for its worst cases.

    It begins from what ``earlier`` attacks made of these, to which its own worst cases are added.
    """
    before = context.spent
    rows, split = context.test.sample_indices(images, seed=context.seed), context.few(images)
    known = {} if earlier is None else earlier
    before_it = {title: _placed(split, rows, *moved) for title, moved in known.items()}
    run = run_suite(context.victim, split, before_it | dict(attacks), norm=context.suite.norm, seed=context.seed)
    known[f"earlier {name}"] = rows, run.images
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
