"""Clean accuracy, and rates under universal perturbations and controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from gambeson.attacks import (
    CONTROLS,
    MORE_CONTROLS,
    PATCH_CONTROLS,
    AdversarialPatch,
    UniversalPerturbation,
    control,
    patch_control,
)
from gambeson.base import UserError
from gambeson.data import Split, as_split
from gambeson.evaluation.rates import Control, LostIou, Measured
from gambeson.tasks import Confusion, Counts, Rate
from gambeson.threat import Ball
from gambeson.victim import Score, Shared, Victim, as_victim, nothing_counts, predict_batches, score_batches

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def scored(function: Callable[Concatenate[Victim, Split, P], ResultT]) -> Callable[Concatenate[Any, Any, P], ResultT]:
    """Let a function of a victim and a split take any model, and any data, of which a data set's test split is used."""

    @functools.wraps(function)
    def call(model: Any, data: Any, /, *args: P.args, **keywords: P.kwargs) -> ResultT:
        with as_victim(model) as victim:
            return function(victim, as_split(data, "test"), *args, **keywords)

    return call


def error_rate(found: Score) -> Rate:
    """Error rate."""
    return found.counts.error_rate


def accuracy_rate(found: Score) -> Rate:
    """Accuracy."""
    return found.counts.accuracy


def change_rate(found: Score) -> Rate:
    """Share of predictions that differ from the clean ones."""
    return found.change_rate


def accuracy(model: nn.Module, data: object, *, seed: int = 0) -> Rate:
    """Accuracy on clean images.

    Here and in every rate of this library, an image is decided by one pass over the model, or by the majority of 21
    (:data:`gambeson.victim.DEFAULT_VOTES`) where the model is random: what is not right in more than half of
    them is wrong.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        seed: of a random model's votes.
    """
    split = as_split(data, "test")
    with as_victim(model) as victim:
        return accuracy_rate(score_batches(victim, split, seed=seed))


def confusion(model: nn.Module, data: object, uap: UniversalPerturbation | None = None, *, seed: int = 0) -> Confusion:
    """Confusion counts of each image, from which pixel accuracy, the IoU of each class and their mean are computed.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        uap: a perturbation of all images, or None for clean ones. Images that it was crafted on are left out, as in
            :func:`universal_evasion`.
        seed: of a random model's draws; see :func:`accuracy`.

    Raises:
        UserError: no label counts, or as :func:`universal_evasion`.
    """
    split = as_split(data, "test") if uap is None else scorable(data, uap)
    with as_victim(model) as victim:
        return confusion_of(victim, split, None if uap is None else uap.shared(victim.device), seed=seed)


def confusion_of(victim: Victim, split: Split, delta: Shared | None = None, *, seed: int = 0) -> Confusion:
    """As :func:`confusion`, of a victim inside its context and a perturbation (1, C, H, W)."""

    def count(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return split.task.confusion(predictions, labels, len(split.classes)).cpu()

    found = Confusion(torch.cat(predict_batches(victim, split, count, delta, seed=seed)), split.classes)
    if not bool(found.counts.any()):
        raise nothing_counts(split)
    return found


def mean_iou(model: nn.Module, data: object, uap: UniversalPerturbation | None = None, *, seed: int = 0) -> Rate:
    """Mean IoU over the classes that occur among the labels, from one confusion matrix.

    Args:
        model: any module from pixels to logits (N, K, H, W).
        data: a split, an (images, label maps) pair, or a data set, of which the test split is used.
        uap: added to every image; None: clean images.
        seed: of a random model's votes.

    Raises:
        UserError: as :func:`confusion`.
    """
    return confusion(model, data, uap, seed=seed).mean_iou


def universal_evasion(model: nn.Module, data: object, uap: UniversalPerturbation, *, seed: int = 0) -> Rate:
    """Universal evasion rate: the error under one perturbation, against the true labels.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        uap: the perturbation.
        seed: of a random model's draws; see :func:`accuracy`.

    Images that the perturbation was crafted on, such as duplicates in the data set, are left out; ``n`` of the rate is
    the number of images left.

    Raises:
        UserError: too many of them are (:func:`gambeson.data.held_out`), or ``uap`` is something else.
    """
    split = scorable(data, uap)
    with as_victim(model) as victim:
        return error_rate(score_batches(victim, split, uap.shared(victim.device), seed=seed))


def fooling_rate(model: nn.Module, data: object, uap: UniversalPerturbation, *, seed: int = 0) -> Rate:
    """Fooling rate: the share of predictions that the perturbation changes, whatever the labels.

    Arguments and errors are those of :func:`universal_evasion`.
    """
    split = scorable(data, uap)
    with as_victim(model) as victim:
        clean = torch.cat(predict_batches(victim, split, lambda found, _: found.int().cpu(), seed=seed))
        return change_rate(score_batches(victim, split, uap.shared(victim.device), seed=seed, clean=clean))


def scorable(data: object, uap: UniversalPerturbation) -> Split:
    """Return the images that a perturbation may be scored on.

    Raises:
        UserError: it is something else, or for images of another size, or crafted on too many of these.
    """
    if not isinstance(uap, UniversalPerturbation):
        raise UserError(
            f"the perturbation is a {type(uap).__name__}: expected a UniversalPerturbation, which knows its images, "
            "from craft or load; score images of your own making with gambeson.evaluation.accuracy"
        )
    split = as_split(data, "test")
    if uap.shape != split.shape:
        raise UserError(
            f"the perturbation is for images of {uap.shape}, but {split.name} has {split.shape}: "
            "score it on images of that size"
        )
    return uap.held_out(split)


@scored
def control_rates(
    victim: Victim, split: Split, ball: Ball, seed: int, controls: Iterable[str] = tuple(CONTROLS)
) -> list[Control]:
    """UER of every control of the same norm: mean and maximum over its patterns.

    Args:
        victim: any module from pixels to logits, or a victim.
        split: a split, an (images, labels) pair, or a data set, of which the test split is used.
        ball: norm and eps of the patterns.
        seed: of the random patterns, and of a random model's votes.
        controls: names, see :func:`gambeson.attacks.control`.

    Returns:
        One entry per control; ``worst`` has an interval that holds for all its patterns at once.
    """
    patterns = {name: patterns_of(name, ball, split.shape, seed).to(victim.device) for name in controls}
    return [
        Control.of(name, [error_rate(score_batches(victim, split, one[None], seed=seed)) for one in some])
        for name, some in patterns.items()
    ]


def patterns_of(name: str, ball: Ball, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the default patterns of a control, (draws, C, H, W)."""
    draws = (CONTROLS | MORE_CONTROLS).get(name, 1)  # an unknown name is refused by control()
    return control(name, ball, shape, draws=draws, seed=seed)


def controls_beside(
    uap: UniversalPerturbation, images: Split, seed: int, controls: Iterable[str] | None = None
) -> dict[str, list[Shared]]:
    """Return the patterns of controls by name: of the same norm and eps, or of the same mask at the same places.

    Args:
        uap: a perturbation, or a patch.
        images: for their shape, and for pieces of them.
        seed: of the random patterns.
        controls: names; None: :data:`gambeson.attacks.CONTROLS`, or :data:`gambeson.attacks.PATCH_CONTROLS` of a patch.
    """
    if not isinstance(uap, AdversarialPatch):
        names = CONTROLS if controls is None else controls
        return {name: list(patterns_of(name, uap.ball, images.shape, seed).split(1)) for name in names}
    patch, names = uap, PATCH_CONTROLS if controls is None else controls
    drawn = {name: patch_control(name, patch, images, seed=seed) for name in names}
    return {name: [patch.placed(one) for one in some.split(1)] for name, some in drawn.items()}


def rates_beside(
    model: nn.Module,
    data: object,
    uap: UniversalPerturbation,
    *,
    seed: int = 0,
    controls: Iterable[str] | None = None,
) -> list[Control]:
    """UER of the controls of a perturbation or of a patch; see :func:`universal_evasion` and :func:`controls_beside`.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        uap: the perturbation or the patch.
        seed: of the random patterns, of a patch's places and of a random model's votes.
        controls: their names.
    """
    split, found = scorable(data, uap), controls_beside(uap, as_split(data, "test"), seed, controls)
    with as_victim(model) as victim:
        return [
            Control.of(
                name, [error_rate(score_batches(victim, split, one.to(victim.device), seed=seed)) for one in some]
            )
            for name, some in found.items()
        ]


Measure = Callable[[Victim, Split, torch.Tensor | None], Measured]
"""Measures what a perturbation (1, C, H, W) does to a split, or what is found on clean images (None)."""


def errors_under(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> Counts:
    """Measure the error."""
    return score_batches(victim, split, delta).counts


def lost_iou(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> LostIou:
    """Measure one minus the mean IoU."""
    return LostIou(confusion_of(victim, split, delta))


RANKED, RANKED_MAPS = 1000, 50
"""Validation images for a cheap ranking of many perturbations; the best are then scored on all of them. Of label maps,
whose every image tells thousands of pixels, fewer (ours)."""


@scored
def strongest(
    victim: Victim,
    validation: Split,
    crafted: UniversalPerturbation,
    *,
    seed: int = 0,
    controls: Iterable[str] = tuple(CONTROLS),
    others: Sequence[UniversalPerturbation] = (),
    measure: Measure = errors_under,
) -> tuple[UniversalPerturbation, float]:
    """Return the perturbation with the highest error on validation, and that error.

    Everything in the ball is a valid universal perturbation: the crafted one, a control, one crafted for another model
    or another eps. Since validation selects, no test image takes part, and the error of the result on test has the
    plain interval of a single rate. Ties go to the first: the crafted one, then ``others``, then the controls.

    Args:
        victim: the model, inside its context.
        validation: the images for selection.
        crafted: the crafted perturbation, which defines ball and provenance.
        seed: of the controls' draws.
        controls: their names.
        others: more perturbations of the same eps.
        measure: what is to be high; the error.
    """
    ball, device = crafted.ball, victim.device

    def error(delta: torch.Tensor, split: Split) -> float:
        return measure(victim, split, delta.to(device)).error

    few = validation.sample(RANKED if validation.task.per_image_label else RANKED_MAPS, seed=seed)
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
