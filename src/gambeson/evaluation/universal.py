"""Rates of a model on a split: clean, and under one universal perturbation or its controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gambeson.attacks import CONTROLS, GradientAttack, UniversalPerturbation, control
from gambeson.base import derive, seeded
from gambeson.data import Split, as_split
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import Control
from gambeson.threat import Ball
from gambeson.victim import DRAWS as PASSES
from gambeson.victim import Score, Victim, predict, score, vote


def error_rate(found: Score) -> Rate:
    """Share of wrong answers."""
    return Rate.of(found.errors, found.answers, found.images)


def accuracy_rate(found: Score) -> Rate:
    """Share of right answers."""
    return Rate.of(found.answers - found.errors, found.answers, found.images)


def change_rate(found: Score) -> Rate:
    """Share of answers that differ from the clean prediction."""
    return Rate.of(found.changed, found.answers, found.images)


@contextmanager
def judged(model: nn.Module, split: Split) -> Iterator[Victim]:
    """Hold a model frozen, for rates: a random one is asked :data:`gambeson.victim.DRAWS` times an image."""
    with Victim(model) as victim:
        if len(split) and victim.meet(split.take(slice(0, 8), victim.device)[0], scores=True).stochastic:
            victim.passes = PASSES
        yield victim


def accuracy(model: nn.Module, data: object, *, seed: int = 0) -> Rate:
    """Accuracy on clean images.

    Here and in every rate of this library, an image is decided by one pass over the model, or by the majority of 21
    (:data:`gambeson.victim.DRAWS`) where the model is random: what is not right in more than half of them is wrong.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, whose test split is then used.
        seed: of a random model's draws.
    """
    split = as_split(data, "test")
    with judged(model, split) as victim:
        return accuracy_rate(score(predict(victim, split, seed=seed), split))


def universal_evasion(model: nn.Module, data: object, uap: UniversalPerturbation, *, seed: int = 0) -> Rate:
    """Universal evasion rate: the share of inputs that the model gets wrong under one perturbation (true labels).

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, whose test split is then used.
        uap: the perturbation.
        seed: of a random model's draws; see :func:`accuracy`.

    Images that the perturbation was crafted on are left out (``.images`` of the rate says how many are left): a data
    set may hold the same picture twice.

    Raises:
        UserError: they are more than chance explains; see :func:`gambeson.data.held_out`.
    """
    split = uap.held_out(as_split(data, "test"))
    with judged(model, split) as victim:
        return error_rate(score(predict(victim, split, uap.delta.to(victim.device), seed=seed), split))


def fooling_rate(model: nn.Module, data: object, uap: UniversalPerturbation, *, seed: int = 0) -> Rate:
    """Fooling rate: the share of inputs whose prediction the perturbation changes. Arguments as above."""
    split = uap.held_out(as_split(data, "test"))
    with judged(model, split) as victim:
        clean = predict(victim, split, seed=seed)
        return change_rate(score(predict(victim, split, uap.delta.to(victim.device), seed=seed), split, clean))


def control_rates(victim: Victim, split: Split, ball: Ball, seed: int) -> list[Control]:
    """UER of every control of the same norm: mean over its draws, and the worst draw."""
    found = []
    shape = split.shape
    for name, draws in CONTROLS.items():
        patterns = control(name, ball, shape, draws=draws, seed=seed).to(victim.device)
        rates = [error_rate(score(predict(victim, split, pattern[None]), split)) for pattern in patterns]
        mean = sum(rate.value for rate in rates) / len(rates)
        worst = max(rates, key=lambda rate: rate.value)
        found.append(Control(name=name, mean=mean, worst=worst, draws=draws))
    return found


DRAWS = 10
"""Draws that a gradient is averaged over where a random model is audited; the papers say 1 to 30."""


_VALUES = 2**21


def at_once(split: Split, most: int = 250) -> int:
    """Return how many images of a split to perturb at a time: fewer where they are large, for the sake of memory.

    250 of 32 pixels, 170 of 64 in colour, 13 of 224.
    """
    return max(1, min(most, _VALUES // max(1, math.prod(split.shape))))


def accuracy_under(victim: Victim, split: Split, attack: GradientAttack, seed: int, batch_size: int = 250) -> Rate:
    """Accuracy on images that ``attack`` perturbs one by one; decided here, on the clipped images it returned.

    On a random model the attack averages its gradients over :data:`DRAWS` draws where it does not say otherwise, and
    the majority of the victim's ``passes`` decides.
    """
    answers, right = 0, 0
    with seeded(seed, "score"):
        for k, (images, labels) in enumerate(split.batches(at_once(split, batch_size), device=victim.device)):
            if k == 0 and attack.draws is None and victim.meet(images).stochastic:
                attack = attack.model_copy(update={"draws": DRAWS})
            moved = attack(victim, images, labels, seed=derive(seed, "batch", k), ignore_index=split.ignore_index)
            correct = vote(victim, moved) == labels
            valid = torch.ones_like(correct) if split.ignore_index is None else labels != split.ignore_index
            answers, right = answers + int(valid.sum()), right + int((correct & valid).sum())
    return Rate.of(right, answers, len(split))
