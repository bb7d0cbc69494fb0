"""Incomplete gradients, and gradients inside a forward: what attacks do that need neither."""

from __future__ import annotations

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import clearly_more
from gambeson.auditing.results import AdaptiveResult
from gambeson.auditing.stages.adaptive import AGREES, MANY, WRONG


def _reached(found: AdaptiveResult) -> str:
    if found.attacked is None:
        return ""
    rounds = ", ".join(f"{one.accuracy} after {one.attack}" for one in found.attacked.rounds)
    return f"; attacked in turn, the sample stays right: {rounds}"


@register(
    "gradient complete",
    condition=f"on clearly more than {100 * MANY:g} % of images the gradient agrees by less than {WRONG:g} with "
    "differences along random directions that agree with each other; or where it agrees less well than usual, attacks "
    "that do without it break clearly more images",
    explanation="A part of the gradient is missing, or it is another function's: low-passed, hidden in some pixels, of "
    "some members of an ensemble alone (Athalye et al. 2018, section 4.1). Such a gradient may well be right along "
    "itself, and attacks that follow it stop early.",
    remedy="Attack by finite differences (gambeson.victim.substitute.FiniteDifferences), a distilled copy or queries; "
    "find what detaches or smooths the gradient.",
    needs=("adaptive",),
)
def _complete(context: AuditContext) -> Finding:
    found = context.adaptive
    if found is None or not found.images:
        return Finding(None, "noise that no seed of torch fixes is larger than all that the steps change")
    false = clearly_more(found.false, found.images, MANY)
    confirmed = not found.inner and found.gain is not None and found.gain > 0
    return Finding(
        not (false or confirmed),
        f"along random directions differences agree with the gradient by {found.median:.3f} (cosine, median of "
        f"{found.images} images), on {found.below} images by less than {AGREES:g}, on {found.false} by less than "
        f"{WRONG:g} though differences over several steps agree with each other{_reached(found)}",
        {"median": found.median, "below": found.below / found.images, "false": found.false / found.images},
    )


@register(
    "no optimisation at test time",
    condition="the model computes gradients inside its forward, and attacks on it without them break clearly more",
    explanation="The model moves its input by gradients before it answers (anti-adversary layers, purification): "
    "attacks through it meet the defence's steps, while what is crafted on the network behind it still works (Croce et "
    "al. 2022, section 4).",
    remedy="Attack the network behind the optimisation (gambeson.victim.substitute.InnerGradientsOff), and score on "
    "the whole model.",
    needs=("adaptive",),
)
def _optimises(context: AuditContext) -> Finding:
    found = context.adaptive
    if found is None or not found.inner:
        return Finding(True, "the model computes no gradients inside its forward")
    gained = found.gain is not None and found.gain > 0
    return Finding(
        not gained,
        f"one forward of the model computes gradients {found.inner} times{_reached(found)}",
        {"inner gradients": found.inner},
    )
