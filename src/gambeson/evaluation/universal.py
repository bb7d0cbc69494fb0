"""Rates of a model on a split: clean, and under one universal perturbation or its controls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gambeson.attacks import CONTROLS, UniversalPerturbation, control
from gambeson.base import UserError
from gambeson.data import Split, as_split
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import Control
from gambeson.threat import Ball
from gambeson.victim import Score, Victim, predict, score, votes_of


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
    """Hold a model frozen, for rates: a random one is asked :data:`gambeson.victim.DRAWS` times per image."""
    with Victim(model) as victim:
        victim.passes = votes_of(victim, split.take(slice(0, 8), victim.device)[0])
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

    Raises:
        UserError: the images are those that the perturbation was crafted on.
    """
    split = as_split(data, "test")
    _refuse_own_images(split, uap)
    with judged(model, split) as victim:
        return error_rate(score(predict(victim, split, uap.delta.to(victim.device), seed=seed), split))


def fooling_rate(model: nn.Module, data: object, uap: UniversalPerturbation, *, seed: int = 0) -> Rate:
    """Fooling rate: the share of inputs whose prediction the perturbation changes. Arguments as above."""
    split = as_split(data, "test")
    _refuse_own_images(split, uap)
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


def _refuse_own_images(split: Split, uap: UniversalPerturbation) -> None:
    if split.fingerprint == uap.about.crafted_on:
        raise UserError(
            f"the perturbation was crafted on these images ({uap.about.crafted_split}): "
            "score it on images it has not seen, such as data.test"
        )
