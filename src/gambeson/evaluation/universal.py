"""Rates of a model on a split: clean, and under one universal perturbation or its controls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gambeson.attacks import CONTROLS, MORE_CONTROLS, UniversalPerturbation, control
from gambeson.data import Split, as_split
from gambeson.evaluation.rates import Control
from gambeson.tasks import Rate
from gambeson.threat import Ball
from gambeson.victim import Score, Victim, predict, score, votes_of


def error_rate(found: Score) -> Rate:
    """Share of wrong answers."""
    return Rate.of(found.errors, found.total, found.images)


def accuracy_rate(found: Score) -> Rate:
    """Share of right answers."""
    return Rate.of(found.total - found.errors, found.total, found.images)


def change_rate(found: Score) -> Rate:
    """Share of answers that differ from the clean prediction."""
    return Rate.of(found.flipped, found.total, found.images)


@contextmanager
def judged(model: nn.Module | Victim, split: Split) -> Iterator[Victim]:
    """Hold a model frozen, for rates: a random one is asked :data:`gambeson.victim.DEFAULT_VOTES` times per image.

    A victim that is inside its context is used as it is.
    """
    if isinstance(model, Victim):
        yield model
        return
    with Victim(model) as victim:
        victim.votes = votes_of(victim, split.take(slice(0, 8), victim.device)[0])
        yield victim


def accuracy(model: nn.Module, data: object, *, seed: int = 0) -> Rate:
    """Accuracy on clean images.

    Here and in every rate of this library, an image is decided by one pass over the model, or by the majority of 21
    (:data:`gambeson.victim.DEFAULT_VOTES`) where the model is random: what is not right in more than half of them is
    wrong.

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


def control_rates(
    victim: Victim, split: Split, ball: Ball, seed: int, controls: Iterable[str] = tuple(CONTROLS)
) -> list[Control]:
    """UER of every control of the same norm: mean over its draws, and the worst draw."""
    found = []
    for name in controls:
        patterns = patterns_of(name, ball, split.shape, seed).to(victim.device)
        rates = [error_rate(score(predict(victim, split, pattern[None]), split)) for pattern in patterns]
        mean = sum(rate.value for rate in rates) / len(rates)
        found.append(Control(name=name, mean=mean, worst=Rate.highest(rates), draws=len(rates)))
    return found


def patterns_of(name: str, ball: Ball, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the customary patterns of a control, (draws, C, H, W)."""
    draws = (CONTROLS | MORE_CONTROLS).get(name, 1)  # the control itself refuses an unknown name
    return control(name, ball, shape, draws=draws, seed=seed)


RANKED = 1000
"""Validation images that rank many perturbations cheaply; the strongest is then judged on all of them."""


def strongest(
    victim: Victim,
    validation: Split,
    crafted: UniversalPerturbation,
    *,
    seed: int = 0,
    controls: Iterable[str] = tuple(CONTROLS),
    others: Sequence[UniversalPerturbation] = (),
) -> tuple[UniversalPerturbation, float]:
    """Return the perturbation that does most harm on validation, and its error there.

    Whatever lies in the ball is a valid universal perturbation: the crafted one, a control, one that was crafted for
    another model or another eps. Validation chooses, so that the choice is made before any test image is looked at,
    and the error on test of what is returned has the plain interval of a single rate. Among equals the first stands:
    the crafted one, then ``others``, then the controls.

    Args:
        victim: the model, inside its context.
        validation: the images that choose.
        crafted: what the attack made; it gives ball and provenance.
        seed: of the controls' draws.
        controls: their names; none: they are left out.
        others: more perturbations of the same eps.
    """
    ball, device = crafted.ball, victim.device

    def error(delta: torch.Tensor, split: Split) -> float:
        return score(predict(victim, split, delta.to(device)), split).error

    few = validation.sample(RANKED, seed=seed)
    patterns = [(name, one[None]) for name in controls for one in patterns_of(name, ball, validation.shape, seed)]
    candidates = [crafted, *others]
    if patterns:
        name, delta = max(patterns, key=lambda pattern: error(pattern[1], few))
        no_images = {"crafted_on": "no images", "crafted_split": "no images"}
        update = {"attack": name, "settings": {"control": name}, "restarts": [], "status": "done", **no_images}
        candidates.append(UniversalPerturbation(delta.cpu(), crafted.about.model_copy(update=update)))
    errors = [error(one.delta, validation) for one in candidates]
    best = max(range(len(errors)), key=errors.__getitem__)
    if best == 0:
        return crafted, errors[0]
    about, source = candidates[best].about, crafted.about
    rivals = [(one.about.attack, rate) for one, rate in zip(candidates[1:], errors[1:], strict=True)]
    models = dict.fromkeys([*about.model.split("+"), *source.model.split("+")])
    chosen = {"restarts": [*source.restarts, *rivals], "chosen_on": validation.name, "model": "+".join(models)}
    chosen_one = candidates[best]
    return UniversalPerturbation(chosen_one.delta, about.model_copy(update=chosen), chosen_one.image_hashes), errors[
        best
    ]
