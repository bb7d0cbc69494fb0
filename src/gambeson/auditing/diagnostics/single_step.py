"""One step against many: a loss surface that misleads the first step (Tramèr et al. 2018, section 4)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from gambeson.attacks import FGSM, IFGSM, RFGSM, GradientAttack, Loss
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import AsFarAsFinite, lower_end
from gambeson.base import eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.outcome import at_once

_GAP = 0.15
"""Share of images beyond which a random start counts: between the 10 points that it gains on an undefended Inception
v3 and the 38 on one trained on single steps (Tramèr et al. 2018, table 2). On a linear loss it loses."""
_FURTHER = 0.05
_NEAR = 0.5
_FALLING = 0.25
_DROP = 0.1
"""Share of its rise that the loss must lose in the step's second half to count as falling."""


def _as_trained(function: Callable[[AuditContext], Finding]) -> Callable[[AuditContext], Finding]:
    """Judge the loss of the logits as they are: single steps on it are what training on single steps defeats."""

    @functools.wraps(function)
    def unscaled(context: AuditContext) -> Finding:
        with context.unscaled():
            return function(context)

    return unscaled


@register(
    "multi-step beats single-step",
    condition="a single gradient step breaks clearly more images than many",
    explanation="The loss surface misleads the gradient beyond the first step (Athalye et al. 2018, section 3.1).",
    remedy="Distrust gradient attacks on this model; use transfer and query attacks, and the logits' margin.",
)
def _multi_step(context: AuditContext) -> Finding:
    single, many = _step(context, 1), context.pgd
    gain = context.compare(many, single)
    return Finding(
        gain.low <= 0,
        f"accuracy under FGSM {context.accuracy(single)}, under PGD {context.accuracy(many)}, both at eps "
        f"{eps_text(context.eps)}: the single step breaks {gain.beyond()}",
        {"single": context.accuracy(single).value, "multi": context.accuracy(many).value},
    )


@register(
    "random start no stronger",
    condition=f"R+FGSM breaks clearly more images than FGSM at the same eps, by {100 * _GAP:g} points",
    explanation="The gradient at the image itself misleads, and a random step away from it frees the attack "
    "(Tramèr et al. 2018, section 4.1, table 2): the mark of training on single steps. On a linear loss R+FGSM is "
    "the weaker of the two.",
    remedy="Trust no single-step number; look at PGD with random starts.",
)
@_as_trained
def _random_start(context: AuditContext) -> Finding:
    plain, started = _step(context, 1), RFGSM(eps=context.eps, norm=context.suite.norm)
    gain = context.compare(plain, started, _GAP)
    return Finding(
        gain.low <= _GAP,
        f"accuracy under FGSM {context.accuracy(plain)}, under R+FGSM {context.accuracy(started)}: the random start "
        f"breaks {gain.beyond(_GAP)}",
        {"plain": context.accuracy(plain).value, "started": context.accuracy(started).value, "gap": gain.value},
    )


@register(
    "monotone in step size",
    condition=f"a gradient step of eps leaves clearly more images right, by {100 * _FURTHER:g} points, than one of "
    "eps / 2 along the same gradient",
    explanation="The loss has a ridge at small eps, along the gradient that training looked at (Tramèr et al. "
    "2018, Figure 1): beyond it the gradient at the image says nothing.",
    remedy="Trust no single-step number; look at PGD with random starts, and at transferred perturbations.",
)
@_as_trained
def _longer_step(context: AuditContext) -> Finding:
    half, whole = _step(context, 0.5), _step(context, 1)
    gain = context.compare(whole, half, _FURTHER)
    return Finding(
        gain.low <= _FURTHER,
        f"accuracy under a step of eps / 2 {context.accuracy(half)}, under one of eps {context.accuracy(whole)}: "
        f"the shorter breaks {gain.beyond(_FURTHER)}",
        {"half": context.accuracy(half).value, "whole": context.accuracy(whole).value},
    )


@register(
    "single step approximates multi-step",
    condition=f"a single step reaches less than {100 * _NEAR:g} % of the rise of the loss that ten reach, and on "
    f"clearly more than {100 * _FALLING:g} % of images the loss falls in its second half",
    explanation="Single-step and multi-step perturbations have little in common and the loss has a ridge between "
    "them (Tramèr et al. 2018, section 4.1: the ratio fell from 19 to 7 %, the cosine from 0.13 to 0.02). Ratio "
    "and cosine alone accuse honest models too, whose loss is merely curved, so that they count with the ridge "
    "alone.",
    remedy="Trust no single-step number; look at PGD with random starts, and at transferred perturbations.",
)
@_as_trained
def _approximation(context: AuditContext) -> Finding:
    """Compare losses and directions of one step and of ten, and how far the loss falls before the step's end."""
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    sample, victim = context.sample, context.victim
    attacks: list[GradientAttack] = [_step(context, 0.5), _step(context, 1), _steps(context)]
    able = [AsFarAsFinite(context.averaged(attack)) for attack in attacks]
    for images, labels in sample.batches(at_once(sample), device=victim.device):
        points = [images]
        points += [attack(victim, images, labels, seed=context.seed, task=sample.task) for attack in able]
        at_image, at_half, at_end, at_many = (_loss(context, point, labels) for point in points)
        single, several = ((point - images).flatten(1).double() for point in points[2:])
        cosines = torch.nn.functional.cosine_similarity(single, several, dim=1)
        best = torch.maximum(at_half, at_end)
        falling = (best - at_end > _DROP * (best - at_image).clamp(min=1e-9)) & (best > at_image)
        columns = (at_image, at_end, at_many, cosines, falling.double())
        rows = sample.task.labelled(labels)
        sums += torch.stack([column[rows].sum() for column in columns]).cpu()
        count += int(rows.sum())
    falls = Rate.of(int(sums[4]), count)
    start, whole, many, cosine = (float(value) / count for value in sums[:4])
    ratio = whole / many if many > 0 else 1.0
    rise = (whole - start) / (many - start) if many > start else 1.0
    return Finding(
        rise >= _NEAR or lower_end(falls) <= _FALLING,
        f"a single step reaches {100 * ratio:.0f} % of the loss of ten small ones and {100 * rise:.0f} % of its rise; "
        f"the cosine of the two is {cosine:.2f}; on {falls} of images the loss falls in the step's second half",
        {"ratio": ratio, "rise": rise, "cosine": cosine, "falls": falls.value},
    )


def _step(context: AuditContext, share: float) -> FGSM:
    return FGSM(eps=share * context.eps, norm=context.suite.norm)


def _steps(context: AuditContext) -> IFGSM:
    return IFGSM(eps=context.eps, norm=context.suite.norm, rel_step_size=0.2)


@torch.no_grad()
def _loss(context: AuditContext, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return Loss()(context.victim.forward_original(images), labels, context.sample.task).double()
