"""The universal perturbations themselves: crafted ones must beat noise, use their budget, and score alike twice."""

from __future__ import annotations

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, class_share, register
from gambeson.auditing.outcome import LEVEL, PairedDifference
from gambeson.auditing.rescoring import ROUNDING
from gambeson.auditing.results import UniversalResult
from gambeson.auditing.stages.universal import rescored
from gambeson.base import UserError, eps_text, generator
from gambeson.data import Dataset
from gambeson.evaluation.outcome import outcome_under
from gambeson.evaluation.rates import strongest_control
from gambeson.evaluation.universal import patterns_of
from gambeson.threat import Ball

_NEAR_CEILING = 0.8
_MORE = 0.05
"""Share of images that a perturbation crafted on test may break beyond the one crafted on train (ours)."""
_HALF, _LEAST = 1000, 64
"""Test images that one is crafted on, at the most and at the least (ours)."""


@register(
    "better than majority class",
    condition="the clean accuracy is not clearly above that of always naming the most frequent class",
    explanation="A model that has learnt nothing cannot be called robust.",
    remedy="Train the model, or check that data, classes and normalisation are its own.",
    gradients=False,
)
def _learnt(context: AuditContext) -> Finding:
    prior = class_share(context)
    return Finding(
        context.clean.low > prior,
        f"clean accuracy {context.clean} against {100 * prior:.1f} % for always naming the most frequent class",
        {"accuracy": context.clean.value, "prior": prior},
    )


@register(
    "crafted beats controls",
    condition="noise of the same size does clearly more harm than the crafted perturbation, or clear harm and as "
    "much as it, far below an error that nothing can exceed",
    explanation="The attack has failed: noise is a perturbation that it could have found.",
    remedy="Give the attack more steps and restarts; look at the gradients' diagnostics.",
    gradients=False,
    comparisons=5,
)
def _beats_controls(context: AuditContext) -> Finding:
    ceiling = _NEAR_CEILING * (1 - class_share(context, rarest=not context.test.task.per_image_label))
    beaten, equalled = [], []
    if not any(point.controls for point in context.universal):
        return Finding(None, "no controls were tried")
    for point in context.universal:
        if (strongest := strongest_control(point.controls)) is None:
            continue
        crafted, worst = point.crafted or point.uer, strongest.worst
        mean = max(rival.mean for rival in point.controls)
        if worst.value > crafted.value and _clearly_worse(context, point):
            beaten.append(point.eps)
        elif worst.low > context.clean.complement.high and crafted.low <= mean and crafted.value < ceiling:
            equalled.append(point.eps)
    if beaten:
        detail = f"noise does more harm than the crafted perturbation at eps {_listed(beaten)}"
    elif equalled:
        detail = f"the crafted perturbation does no clear harm beyond that of noise at eps {_listed(equalled)}"
    else:
        detail = "no control does clearly more harm than the crafted perturbation at any eps"
    return Finding(not beaten and not equalled, detail, {"losers": len(beaten), "equals": len(equalled)})


def _listed(radii: list[float]) -> str:
    return ", ".join(eps_text(eps) for eps in radii)


def _clearly_worse(context: AuditContext, point: UniversalResult) -> bool:
    """Whether a control breaks clearly more of the same images than the perturbation that was crafted."""
    victim, test = context.victim, context.test
    crafted = outcome_under(victim, test, context.crafted_at(point.eps).delta)
    ball = Ball(eps=point.eps, norm=context.suite.norm)
    rivals = [patterns_of(rival.name, ball, test.shape, context.seed) for rival in point.controls]
    level = LEVEL / sum(map(len, rivals))
    return any(
        PairedDifference.of(crafted, outcome_under(victim, test, pattern[None]), level=level).low > 0
        for patterns in rivals
        for pattern in patterns
    )


@register(
    "crafted on train beats crafted on test",
    condition="a perturbation crafted on one half of the test images is clearly stronger on the other half than the "
    f"one crafted on training images, by {100 * _MORE:g} points",
    explanation="Training images lead the attack astray: the model knows them and answers otherwise around them, or "
    "they are unlike those it is scored on. No rate that is reported comes from a perturbation crafted on test images.",
    remedy="Craft on images of the kind that the model is scored on, which it has not been trained on.",
)
def _beats_unseen(context: AuditContext) -> Finding:
    test, victim, half = context.test, context.victim, min(len(context.test) // 2, _HALF)
    if half < _LEAST:
        return Finding(None, f"of {len(test)} test images no half is large enough to craft on")
    order = torch.randperm(len(test), generator=generator(context.seed, "halves"))
    held = test.subset(order[half : 2 * half])
    train, validation = (test.subset(rows) for rows in order[:half].split([half - half // 4, half // 4]))
    try:
        data = Dataset(test.name, train, validation, held, test.classes)
    except UserError as error:  # of one class
        return Finding(None, f"the test images cannot be halved: {error}")
    attack = context.suite.universal(context.eps, restarts=1).model_copy(update={"probe_starts": 0})
    uap = attack.craft(victim, data, seed=context.seed)
    deltas = context.crafted_at(context.eps).delta, uap.delta
    usual, other = (outcome_under(victim, held, delta) for delta in deltas)
    gain = PairedDifference.of(usual, other)
    return Finding(
        gain.low <= _MORE,
        f"on {half} test images the accuracy at eps {eps_text(context.eps)} is {usual.accuracy} under the perturbation "
        f"crafted on training images, {other.accuracy} under one crafted on {half} other test images: that breaks "
        f"{gain.beyond(_MORE)}",
        {"train": usual.accuracy.value, "test": other.accuracy.value},
    )


@register(
    "perturbation budget used",
    condition="a crafted perturbation stays below 5 % of its eps",
    explanation="The attack hardly moved: it had no gradient to follow.",
    remedy="Look at the gradients' diagnostics.",
    gradients=False,
)
def _used(context: AuditContext) -> Finding:
    states = {
        point.eps: point.status if point.crafted is None else context.crafted_at(point.eps).about.status
        for point in context.universal
    }
    idle = ", ".join(f"{eps_text(eps)} ({status})" for eps, status in states.items() if status != "done")
    return Finding(
        not idle, "every perturbation uses its budget" if not idle else f"the attack hardly moved at eps {idle}"
    )


@register(
    "UER monotone in eps",
    condition="the UER at some eps is clearly below that at a smaller one",
    explanation="What harms inside a ball lies inside every larger one: the attack failed at the larger eps.",
    remedy="Give the attack more steps and restarts; look at the gradients' diagnostics.",
    gradients=False,
)
def _rises(context: AuditContext) -> Finding:
    points = context.universal
    if len(points) < 2:
        return Finding(None, "the curve has a single eps")
    falls = [
        f"from {one.uer} at eps {eps_text(one.eps)} to {other.uer} at {eps_text(other.eps)}"
        for k, one in enumerate(points)
        for other in points[k + 1 :]
        if other.uer.high < one.uer.low
    ]
    drop = max(one.uer.value - other.uer.value for k, one in enumerate(points) for other in points[k + 1 :])
    largest = f"the UER falls by {100 * max(0.0, drop):.1f} % at most, not clearly: no interval lies below a former one"
    return Finding(
        not falls,
        f"the UER falls {falls[0]}" if falls else largest,
        {"largest_fall": max(0.0, drop)},
    )


@register(
    "re-scoring reproducible",
    condition="the stored perturbation does not give the reported rate once more",
    explanation="The rate is not a property of model and perturbation alone.",
    remedy="Find what else the answer depends on: a state kept between calls, the make-up of a batch, randomness "
    "that is not drawn from the global generators of torch, numpy or Python (which the audit seeds).",
    gradients=False,
)
def _agrees(context: AuditContext) -> Finding:
    point = context.middle
    if any(one.differs for one in point.rescored):
        return Finding(None, "the answers depend on how images are asked for, and the reported rate is the worst")
    again, traits = rescored(context, context.uaps[point.eps]), context.victim.traits
    slight = traits is not None and traits.varies and not context.subject.random
    return Finding(
        abs(again - point.uer.value) <= (ROUNDING if slight else 0),
        f"the stored perturbation at eps {eps_text(point.eps)} gives a UER of {100 * again:.1f} %, reported was "
        f"{point.uer}",
        {"again": again, "reported": point.uer.value},
    )
