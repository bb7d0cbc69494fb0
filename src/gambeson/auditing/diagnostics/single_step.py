"""One step against many: a loss surface that misleads the first step (Tramèr et al. 2018, section 4)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from gambeson.attacks import FGSM, IFGSM, RFGSM, GradientAttack, Loss
from gambeson.auditing.context import Evidence
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import AsFarAsFinite, Gain
from gambeson.evaluation import Rate
from gambeson.evaluation.outcome import at_once
from gambeson.victim import counting

_GAP = 0.15
"""Share of images beyond which a random start counts: between the 10 points that it gains on an undefended Inception
v3 and the 38 on one trained on single steps (Tramèr et al. 2018, table 2). On a linear loss it loses."""
_FURTHER = 0.05
_NEAR = 0.5
_FALLING = 0.25
_DROP = 0.1
"""Share of its rise that the loss must lose in the step's second half to count as falling."""


def _as_trained(look: Callable[[Evidence], Finding]) -> Callable[[Evidence], Finding]:
    """Look at the loss of the logits as they are: single steps on it are what training on single steps defeats."""

    @functools.wraps(look)
    def looked(evidence: Evidence) -> Finding:
        with evidence.unscaled():
            return look(evidence)

    return looked


@register(
    "multi-step beats single-step",
    condition="a single gradient step breaks clearly more images than many",
    explanation="The loss surface misleads the gradient beyond the first step (Athalye et al. 2018, section 3.1).",
    remedy="Distrust gradient attacks on this model; use transfer and query attacks, and the logits' margin.",
)
def _multi_step(evidence: Evidence) -> Finding:
    single, many = _step(evidence, 1), evidence.suite.pgd(evidence.eps)
    gain = Gain.of(evidence.outcome(many), evidence.outcome(single))
    return Finding(
        gain.low <= 0,
        f"accuracy under FGSM {evidence.accuracy(single)}, under PGD {evidence.accuracy(many)}, both at eps "
        f"{evidence.eps:.4g}",
        {"single": evidence.accuracy(single).value, "multi": evidence.accuracy(many).value},
    )


@register(
    "random start gains nothing",
    condition=f"R+FGSM breaks clearly more images than FGSM at the same eps, by {100 * _GAP:g} points",
    explanation="The gradient at the image itself misleads, and a random step away from it frees the attack "
    "(Tramèr et al. 2018, section 4.1, table 2): the mark of training on single steps. On a linear loss R+FGSM is "
    "the weaker of the two.",
    remedy="Trust no single-step number; look at PGD with random starts.",
)
@_as_trained
def _random_start(evidence: Evidence) -> Finding:
    plain, started = _step(evidence, 1), RFGSM(eps=evidence.eps, norm=evidence.suite.norm)
    gain = Gain.of(evidence.outcome(plain), evidence.outcome(started))
    return Finding(
        gain.low <= _GAP,
        f"accuracy under FGSM {evidence.accuracy(plain)}, under R+FGSM {evidence.accuracy(started)}: the random start "
        f"breaks {gain} more",
        {"plain": evidence.accuracy(plain).value, "started": evidence.accuracy(started).value, "gap": gain.value},
    )


@register(
    "longer step, more errors",
    condition=f"a gradient step of eps leaves clearly more images right, by {100 * _FURTHER:g} points, than one of "
    "eps / 2 along the same gradient",
    explanation="The loss has a ridge at small eps, along the gradient that training looked at (Tramèr et al. "
    "2018, Figure 1): beyond it the gradient at the image says nothing.",
    remedy="Trust no single-step number; look at PGD with random starts, and at transferred perturbations.",
)
@_as_trained
def _longer_step(evidence: Evidence) -> Finding:
    half, whole = _step(evidence, 0.5), _step(evidence, 1)
    gain = Gain.of(evidence.outcome(whole), evidence.outcome(half))
    return Finding(
        gain.low <= _FURTHER,
        f"accuracy under a step of eps / 2 {evidence.accuracy(half)}, under one of eps {evidence.accuracy(whole)}",
        {"half": evidence.accuracy(half).value, "whole": evidence.accuracy(whole).value},
    )


@register(
    "single step approximates",
    condition=f"a single step reaches less than {100 * _NEAR:g} % of the rise of the loss that ten reach, and on "
    f"clearly more than {100 * _FALLING:g} % of images the loss falls in its second half",
    explanation="Single-step and multi-step perturbations have little in common and the loss has a ridge between "
    "them (Tramèr et al. 2018, section 4.1: the ratio fell from 19 to 7 %, the cosine from 0.13 to 0.02). Ratio "
    "and cosine alone accuse honest models too, whose loss is merely curved, so that they count with the ridge "
    "alone.",
    remedy="Trust no single-step number; look at PGD with random starts, and at transferred perturbations.",
)
@_as_trained
def _approximation(evidence: Evidence) -> Finding:
    """Compare losses and directions of one step and of ten, and how far the loss falls before the step's end."""
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    sample, victim = evidence.sample, evidence.victim
    attacks: list[GradientAttack] = [_step(evidence, 0.5), _step(evidence, 1), _steps(evidence)]
    able = [AsFarAsFinite(evidence.averaged(attack)) for attack in attacks]
    for images, labels in sample.batches(at_once(sample), device=victim.device):
        points = [images]
        points += [
            attack(victim, images, labels, seed=evidence.seed, ignore_index=sample.ignore_index) for attack in able
        ]
        at_image, at_half, at_end, at_many = (_loss(evidence, point, labels) for point in points)
        single, several = ((point - images).flatten(1).double() for point in points[2:])
        cosines = torch.nn.functional.cosine_similarity(single, several, dim=1)
        best = torch.maximum(at_half, at_end)
        falling = (best - at_end > _DROP * (best - at_image).clamp(min=1e-9)) & (best > at_image)
        columns = (at_image, at_end, at_many, cosines, falling.double())
        rows = counting(labels, sample.ignore_index).view(len(labels), -1).any(1)
        sums += torch.stack([column[rows].sum() for column in columns]).cpu()
        count += int(rows.sum())
    falls = Rate.of(int(sums[4]), count)
    start, whole, many, cosine = (float(value) / count for value in sums[:4])
    ratio = whole / many if many > 0 else 1.0
    rise = (whole - start) / (many - start) if many > start else 1.0
    return Finding(
        rise >= _NEAR or falls.low <= _FALLING,
        f"a single step reaches {100 * ratio:.0f} % of the loss of ten small ones and {100 * rise:.0f} % of its rise; "
        f"the cosine of the two is {cosine:.2f}; on {falls} of images the loss falls in the step's second half",
        {"ratio": ratio, "rise": rise, "cosine": cosine, "falls": falls.value},
    )


def _step(evidence: Evidence, share: float) -> FGSM:
    return FGSM(eps=share * evidence.eps, norm=evidence.suite.norm)


def _steps(evidence: Evidence) -> IFGSM:
    return IFGSM(eps=evidence.eps, norm=evidence.suite.norm, step=0.2)


@torch.no_grad()
def _loss(evidence: Evidence, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return Loss()(evidence.victim.exact(images), labels, evidence.sample.ignore_index).double()
