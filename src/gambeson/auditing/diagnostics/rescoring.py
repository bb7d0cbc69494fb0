"""Answers and gradients asked for once more: in other batches, at other times, and inside the ball."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.diagnostics.gradient_masking import probe
from gambeson.auditing.outcome import AsFarAsFinite, PairedDifference, clearly_more
from gambeson.auditing.rescoring import SHRINK, Perturbed, rescored_in, ways
from gambeson.auditing.results import Rescored
from gambeson.auditing.stages.per_image import PGD_NAME
from gambeson.auditing.steadiness import FALSE, changed_since
from gambeson.base import generator
from gambeson.evaluation.outcome import outcome
from gambeson.tasks import Counts
from gambeson.victim import score

_SHOWN = 3
_RADII, _MORE = 4, 0.01
"""Smaller balls, and the share of images that may fall in them and stand in the whole one (ours)."""
_AGAIN = 64
_AGAIN_BATCH = 16


def _listed(found: Iterable[tuple[str, Rescored]]) -> str:
    said = [
        f"{what} {one.way}: {100 * one.right:.1f} % right, reported {100 * one.reported:.1f} % of {one.images}"
        for what, one in found
    ]
    return "; ".join(said)


def _stored(context: AuditContext) -> Iterator[tuple[str, Rescored]]:
    """What stages found where they asked again for the images that they had perturbed."""
    for point in context.universal:
        yield from ((f"under the pattern of eps {point.eps:.4g}", one) for one in point.rescored)
    for attack in context.per_image:
        yield from ((f"under {attack.attack}", one) for one in attack.rescored)


def _judged(found: list[tuple[str, Rescored]]) -> tuple[bool, str, dict[str, float]]:
    differing = [(what, one) for what, one in found if one.differs]
    most = max(found, key=lambda entry: entry[1].reported - entry[1].right)
    detail = _listed(sorted(differing, key=lambda entry: entry[1].right - entry[1].reported)[:_SHOWN] or [most])
    if len(differing) > _SHOWN:
        detail += f"; and {len(differing) - _SHOWN} more of {len(found)}"
    elif not differing:
        detail = f"asked again {len(found)} times, no difference is clear; the worst is {detail}"
    worst = max((one.reported - one.right for _, one in found), default=0.0)
    return not differing, detail, {"largest loss": worst, "differing": len(differing) / len(found)}


@register(
    "alike in every batch",
    condition="images, clean or perturbed, are clearly more or less often right in batches of another size, order or "
    "make-up than in those that rates were taken on, or asked as other callers do: in a thread of their own, in "
    "torch's inference mode, in channels-last layout, with gradients on, under other seeds",
    explanation="An answer is the batch's and not the image's, so that a rate depends on how images were put together; "
    "or it is made for whoever audits. The worst of the rates is the one reported.",
    remedy="Let nothing reach across the batch and nothing depend on its size or on who asks; asked for one by one, a "
    "model has one answer.",
    gradients=False,
    comparisons=5,
)
def _alike(context: AuditContext) -> Finding:
    batches = {way.name for way in ways(context, clean=True)}
    clean = Perturbed(split=context.test, right=score(context.predictions, context.test).counts)
    found = [("clean,", one) for one in rescored_in(context, clean, ways(context, clean=True))]
    found += [(what, one) for what, one in _stored(context) if one.way in batches]
    if not found:
        return Finding(None, "the model takes batches of one size alone")
    return Finding(*_judged(found))


@register(
    "no weaker inside the ball",
    condition=f"perturbed images are clearly more often wrong once changes are made smaller at random or rounded; or "
    f"PGD that keeps up to {100 * SHRINK:g} % off the surface of the ball breaks clearly more; or PGD in "
    f"{_RADII} smaller balls, of radii drawn at random, breaks clearly more than {100 * _MORE:g} % of images among "
    "those that the strongest attack with gradients leaves right",
    explanation="What looks like robustness holds at the surface of the ball only, where attacks end: a perturbation "
    "inside is as allowed. The worst of the rates is the one reported.",
    remedy="Attack with changes of unequal size (PGD's shrink) and with smaller eps; find what measures how large a "
    "change is, or rounds, counts or compares pixels.",
    gradients=False,
    comparisons=6,
)
def _inside(context: AuditContext) -> Finding:
    batches = {way.name for way in ways(context, clean=True)}
    found = [(what, one) for what, one in _stored(context) if one.way not in batches]
    passed, detail, numbers = _judged(found) if found else (True, "", {})
    if context.suite.norm == "inf" and not context.subject.black_box:
        usual = probe(context, context.eps)
        within = usual.model_copy(update={"shrink": SHRINK})
        gain = PairedDifference.of(context.outcome(usual), context.outcome(within))
        passed = passed and gain.low <= 0
        said = f"PGD that keeps off the surface leaves {context.accuracy(within)} right, and breaks {gain.beyond()}"
        detail, numbers = "; ".join(filter(None, [detail, said])), numbers | {"gain": gain.value}
    if context.test.task.per_image_label and not (context.subject.black_box or context.subject.random):
        gain = context.compare_counts(lambda on: context.beyond_white_box(_smaller(context), on)[:2], _MORE)
        passed = passed and gain.low <= _MORE
        said = f"PGD in {_RADII} smaller balls breaks {gain.beyond(_MORE)}"
        detail, numbers = "; ".join(filter(None, [detail, said])), numbers | {"smaller": gain.value}
    return Finding(passed if detail else None, detail or "no perturbed images were asked for again", numbers)


def _smaller(context: AuditContext) -> list[AsFarAsFinite]:
    """Short PGD in balls of radii below eps, one drawn from each part of the way to it."""
    drawn = torch.rand(_RADII, generator=generator(context.seed, "radii")).tolist()
    radii = [context.eps * (k + share) / _RADII for k, share in enumerate(drawn)]
    return [AsFarAsFinite(probe(context, radius)) for radius in radii]


@register(
    "gradient independent of the batch",
    condition="the gradient of the same images changes with the size or order of their batch, or from call to call",
    explanation="Attacks follow a gradient that is false in batches of their size, or during some of their calls: "
    "what they left right is no sign of robustness.",
    remedy="Let the model compute the same whatever it is called with before and beside; attack it one by one.",
)
def _steady(context: AuditContext) -> Finding:
    found = context.steadiness
    if found is None:
        return Finding(None, "no gradients were compared")
    changed = changed_since(context)
    detail = found.detail
    if changed is not None:
        detail += f"; {changed} of {found.images} changed from the audit's beginning to its end"
    passed = found.passed and not (changed and clearly_more(changed, found.images, FALSE))
    return Finding(passed, detail, found.numbers)


@register(
    "attack repeats its outcome",
    condition="the same attack, repeated at the end of the audit in small batches, breaks clearly more images",
    explanation="The attack was hindered when the reported number was taken: by the size of its batches, or for a "
    "time.",
    remedy="Find what counts calls or images; attack in small batches and repeat.",
    needs=("per-image",),
)
def _again(context: AuditContext) -> Finding:
    kept = context.outcomes.of(f"per_image:{PGD_NAME}")
    if kept is None:
        return Finding(None, "which images PGD left right was not kept")
    rows = context.test.sample_indices(min(_AGAIN, context.suite.sample), seed=context.seed)
    before = Counts(kept[1].right[rows], kept[1].total[rows])
    attack = context.averaged(context.pgd.model_copy(update={"restarts": 1}))
    again = outcome(context.victim, context.test.subset(rows), attack, context.seed, batch_size=_AGAIN_BATCH)
    gain = PairedDifference.of(before, again)
    return Finding(
        gain.low <= 0,
        f"PGD left {before.accuracy} right, and {again.accuracy} of the same images when repeated in batches of "
        f"{_AGAIN_BATCH}: that breaks {gain.beyond()}",
        {"before": before.accuracy.value, "again": again.accuracy.value},
    )
