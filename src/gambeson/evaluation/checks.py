"""Conditions under which a robustness number means nothing. A failed one overturns the verdict."""

from __future__ import annotations

import math

import torch

from gambeson.attacks import FGSM, PGD, Loss, UniversalPerturbation
from gambeson.data import Dataset, Split
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import Check, Universal
from gambeson.evaluation.universal import DRAWS, accuracy_under, error_rate
from gambeson.threat import Norm
from gambeson.victim import Victim, predict, score

_SAMPLE = 200
"""Images that the checks of single properties look at."""


def is_deterministic(victim: Victim, split: Split) -> Check:
    """Two forwards of the same images must agree: a random model needs averaged gradients and many draws."""
    images, _ = split.take(slice(0, _SAMPLE), victim.device)
    with torch.no_grad():
        first, second = victim.exact(images), victim.exact(images)
    gap = float((first - second).abs().max())
    return Check(
        name="deterministic",
        passed=gap == 0,
        detail=f"two forwards of the same images differ by at most {gap:.3g} in their logits"
        + ("" if gap == 0 else f"; gradients were averaged over {DRAWS} draws, every rate is of one pass"),
    )


def has_learnt(clean: Rate, data: Dataset) -> Check:
    """The clean accuracy must lie above that of always naming the most frequent class."""
    labels = data.test.labels.flatten()
    if data.test.ignore_index is not None:
        labels = labels[labels != data.test.ignore_index]
    prior = float(labels.bincount().max() / max(1, len(labels)))
    return Check(
        name="better than guessing",
        passed=clean.low > prior,
        detail=f"clean accuracy {clean} against {100 * prior:.1f} % for always naming the most frequent class"
        + ("" if clean.low > prior else "; a model that has learnt nothing cannot be called robust"),
    )


def gradients_are_alive(victim: Victim, split: Split) -> Check:
    """Few images may have an input gradient of exactly zero: such images cannot be attacked by following it."""
    images, labels = split.take(slice(0, _SAMPLE), victim.device)
    with torch.enable_grad():
        point = images.requires_grad_()
        value = Loss()(victim.exact(point), labels, split.ignore_index).sum()
        gradient = victim.gradient(value, point, len(images))
    dead = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    passed = dead <= 0.1 * len(images)
    return Check(
        name="gradients alive",
        passed=passed,
        detail=f"{dead} of {len(images)} images have an input gradient of exactly zero"
        + ("" if passed else "; the model hides its gradient (saturated, detached or rounded values)"),
    )


def multi_step_is_stronger(victim: Victim, split: Split, eps: float, norm: Norm, pgd: Rate, seed: int) -> Check:
    """A single gradient step must not break more images than many (Tramèr et al. 2018, section 4)."""
    single = accuracy_under(victim, split, FGSM(eps=eps, norm=norm), seed)
    passed = single.high >= pgd.low
    return Check(
        name="multi-step beats single-step",
        passed=passed,
        detail=f"accuracy under FGSM {single}, under PGD {pgd}, both at eps {eps:.4g}"
        + ("" if passed else "; the loss surface misleads the gradient"),
    )


def whole_box_breaks(victim: Victim, split: Split, norm: Norm, seed: int) -> Check:
    """With the whole box allowed, every image can be made anything: accuracy must fall to almost nothing."""
    few = split.subset(torch.arange(min(_SAMPLE, len(split))))
    eps = 1.0 if norm == "inf" else math.sqrt(math.prod(few.shape))
    left = accuracy_under(victim, few, PGD(eps=eps, norm=norm, steps=40), seed)
    passed = left.low <= 0.05
    return Check(
        name="unbounded attack succeeds",
        passed=passed,
        detail=f"accuracy under PGD with the whole box allowed: {left}"
        + ("" if passed else "; the attack fails for another reason than the model's robustness"),
    )


def crafting_beats_controls(points: list[Universal]) -> Check:
    """No control may do clearly more harm than the perturbation crafted at the same eps."""
    losers = [point for point in points if any(point.uer.high < rival.worst.low for rival in point.controls)]
    radii = ", ".join(f"{point.eps:.4g}" for point in losers)
    return Check(
        name="crafted beats controls",
        passed=not losers,
        detail="no control does clearly more harm than the crafted perturbation at any eps"
        if not losers
        else f"noise does more harm than the crafted perturbation at eps {radii}; the attack has failed",
    )


def perturbations_are_used(points: list[Universal]) -> Check:
    """Every perturbation must use its budget."""
    idle = ", ".join(f"{point.eps:.4g} ({point.status})" for point in points if point.status != "done")
    return Check(
        name="budget used",
        passed=not idle,
        detail="every perturbation uses its budget" if not idle else f"the attack hardly moved at eps {idle}",
    )


def rescoring_agrees(victim: Victim, split: Split, point: Universal, uap: UniversalPerturbation) -> Check:
    """The stored perturbation must give the reported rate once more."""
    again = error_rate(score(predict(victim, split, uap.delta.to(victim.device)), split))
    return Check(
        name="re-scoring agrees",
        passed=again == point.uer,
        detail=f"the stored perturbation at eps {point.eps:.4g} gives a UER of {again}, reported was {point.uer}",
    )
