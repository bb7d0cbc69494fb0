"""Validation between epochs, clean and robust, and selection of the best epoch.

Rates of label maps are over pixels; beside them stands the mean IoU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from gambeson.attacks import PGD, StochasticPGD
from gambeson.attacks.solver import GradientWarning
from gambeson.base import derive, place, total
from gambeson.data import Dataset, Split
from gambeson.defenses import Defense
from gambeson.tasks import Confusion
from gambeson.training.recipe import Recipe
from gambeson.victim import Victim, auto_batch_size, nothing_counts, predict, predict_batches, score, vote

_IMAGES = 500
ACCURACY = "validation_accuracy"
BALANCED, BY_CHANCE = "validation_balanced_accuracy", "validation_balanced_chance"
"""Mean over the classes of the share that is right, and the most of it by chance; see :func:`chance_level`."""
_CLEAR = 0.25
"""Part of the way from chance to no error that is clear, however few images a class has (ours)."""


def validate(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Return the clean accuracy, also as the mean over the classes and what that is by chance; of label maps mean IoU.

    Raises:
        UserError: no label of the validation split counts.
    """
    with _one_pass(model) as victim:
        found = _scores(victim, data.validation)
    more = {"validation_mean_iou": found.iou, BALANCED: found.balanced, BY_CHANCE: found.chance}
    return {ACCURACY: 1 - found.error} | {name: value for name, value in more.items() if value is not None}


def warn_at_chance(last: dict[str, float], split: Split) -> None:
    """Warn if a model is no better than chance, see :func:`chance_level`.

    Args:
        last: the last entry of the history.
        split: the validation split.
    """
    if how := chance_level(last, split):
        warnings.warn(
            f"the model has not learnt: {how}; train longer, change the learning rate, or check the labels",
            stacklevel=2,
        )


def chance_level(last: dict[str, float], split: Split) -> str:
    """Return by what a model is no better than chance, as a clause; empty if it is better.

    It is not where the mean over the classes of the share that is right is at most two standard errors above one over
    their number, which answers have that do not depend on the images: one answer for all, those of the model in
    another order, and, as far as a quarter of the way to no error, classes drawn at random. A model that is always
    right is better. Of label maps, where its mean IoU is no more than one over the number of classes: one class for all
    pixels has no more.

    Args:
        last: an entry of a history.
        split: the validation split.
    """
    if "validation_mean_iou" in last:
        found, most = last["validation_mean_iou"], 1 / len(split.classes)
        how = f"its mean IoU on {split.name} is {100 * found:.1f} %, and a single class has up to {100 * most:.1f} %"
        return "" if found > most else how
    if not _at_chance(last):
        return ""
    counted = split.labels[split.task.valid(split.labels)]
    most = float(counted.bincount().max()) / len(counted)
    return (
        f"it gets {100 * last[ACCURACY]:.1f} % of {split.name} right, and the most frequent class alone is "
        f"{100 * most:.1f} % (mean over the classes {100 * last[BALANCED]:.1f} %, by chance up to "
        f"{100 * last[BY_CHANCE]:.1f} %)"
    )


def _at_chance(entry: dict[str, float]) -> bool:
    return BALANCED in entry and entry[ACCURACY] < 1 and entry[BALANCED] <= entry[BY_CHANCE]


class _Scores(NamedTuple):
    error: float
    iou: float | None = None
    """Mean IoU, of label maps."""
    balanced: float | None = None
    chance: float | None = None
    """As :data:`BALANCED` and :data:`BY_CHANCE`, of one label per image."""


@contextmanager
def _one_pass(model: nn.Module) -> Iterator[Victim]:
    """Enter a model as a victim; a random one has a single vote, because epochs are only compared."""
    with Victim(model) as victim:
        victim.votes = 1
        yield victim


def _scores(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> _Scores:
    """Score a split; every process scores its share of the images."""
    if len(split) == 0:
        raise nothing_counts(split)
    first, step = place()
    own = split.subset(torch.arange(first % len(split), len(split), step))  # with few images, some are scored twice
    if split.task.per_image_label:
        predictions, labels = predict(victim, own, delta), own.labels
        found, valid = score(predictions, own, whole=False), split.task.valid(labels)
        groups = (labels[valid], predictions[valid & (predictions >= 0)], labels[valid & (predictions == labels)])
        counts = torch.stack([group.bincount(minlength=len(split.classes)) for group in groups])
        sums = total([found.errors, found.total, *counts.flatten().tolist()], victim.device)
        errors, answers, by_class = sums[0], sums[1], torch.tensor(sums[2:], dtype=torch.double).view(3, -1)
        if answers == 0:
            raise nothing_counts(split)
        images, given, right = by_class[:, by_class[0] > 0]
        return _Scores(errors / answers, None, *_balanced(images, given, right, answers))

    def count(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return split.task.confusion(predictions, labels, len(split.classes)).sum(0)

    counts = torch.stack(predict_batches(victim, own, count, delta)).sum(0)
    counts = torch.tensor(total(counts.flatten().tolist(), victim.device)).view(1, *counts.shape)
    if not bool(counts.any()):
        raise nothing_counts(split)
    summed = Confusion(counts, split.classes)
    return _Scores(1 - summed.value("accuracy"), summed.value("mean_iou"))


def _balanced(images: torch.Tensor, given: torch.Tensor, right: torch.Tensor, answers: int) -> tuple[float, float]:
    """Mean over the classes of the share that is right, and the most of it by chance, two standard errors included.

    Args:
        images: (K,), of each class, one or more.
        given: (K,), how often each class is the answer.
        right: (K,), images of each class that are right.
        answers: images in all.
    """
    classes = len(images)

    def most(share: torch.Tensor) -> float:
        return 1 / classes + 2 * float((share * (1 - share) / images).sum().sqrt()) / classes

    drawn = most(torch.full_like(images, 1 / classes))  # which few images of a rare class put out of reach
    return float((right / images).mean()), max(
        most(given / answers), min(drawn, (1 + _CLEAR * (classes - 1)) / classes)
    )


def validate_robustly(model: nn.Module, data: Dataset, defense: Defense, seed: int) -> dict[str, float]:
    """Return the universal evasion rate, of label maps also the mean IoU then, and the accuracy under PGD.

    At the defence's eps, by short attacks, to compare epochs: 50 steps of stochastic PGD from zero, and 10 of PGD on
    the same 500 images in every epoch. A random model has a single vote per image.
    """
    ball = {"eps": getattr(defense, "eps", None), "norm": getattr(defense, "norm", "inf")}
    if not ball["eps"]:
        return {}
    universal = StochasticPGD(**ball, steps=50, batch_size=128, probe_starts=0, temperature=1.0)
    with warnings.catch_warnings():  # after the first epochs no answer may be as sure as the truncation
        warnings.simplefilter("ignore", GradientWarning)
        uap = universal.craft(model, data, seed=derive(seed, "validation"))
    few = data.validation.sample(_IMAGES, seed=seed)
    with _one_pass(model) as victim:
        delta = uap.delta.to(victim.device)
        under = _scores(victim, data.validation, delta)
        found = {"validation_uer": under.error}
        found |= {} if under.iou is None else {"validation_uap_mean_iou": under.iou}
        attack, right, counted = PGD(**ball, steps=10, eot_samples=1), 0, 0
        size = auto_batch_size(few.shape, len(few), 2**21 if few.task.per_image_label else 2**22)
        for images, labels in few.batches(size, device=victim.device):
            counts = few.task.counts(vote(victim, attack(victim, images, labels, seed=seed, task=few.task)), labels)
            right, counted = right + int(counts.right.sum()), counted + int(counts.total.sum())
    return found | {"validation_pgd_accuracy": right / max(1, counted)}


def is_due(history: list[dict[str, float]], recipe: Recipe, defense: Defense) -> bool:
    """Whether the last epoch, whose clean accuracy is known, is to be attacked.

    It is after every ``recipe.robust_every`` epochs, after the last, and where it is the first that has the least
    accuracy: a training that ends early, or keeps it in few epochs, then has one to choose.
    """
    every, done = recipe.robust_every, len(history)
    if not every or done % every == 0 or done == recipe.epochs:
        return bool(every)
    late, accurate = done > defense.fully_active_epoch(recipe.epochs), history[-1][ACCURACY] >= recipe.least_accuracy
    return recipe.least_accuracy > 0 and late and accurate and not _ranks(history, recipe, defense)


def is_best(history: list[dict[str, float]], recipe: Recipe, defense: Defense) -> bool:
    """Whether the last epoch is the best so far by the recipe's rule; an epoch that was not measured is not.

    Nor is one before all parts of the objective were active, such as noise that starts later.
    """
    ranks = _ranks(history, recipe, defense)
    last = ranks.pop(len(history) - 1, None)
    return last is not None and last > max(ranks.values(), default=-math.inf)


def _ranks(history: list[dict[str, float]], recipe: Recipe, defense: Defense) -> dict[int, float]:
    """The ranks of those epochs that may be chosen."""
    return {
        epoch: value
        for epoch, entry in enumerate(history)
        if epoch >= defense.fully_active_epoch(recipe.epochs)
        and entry[ACCURACY] >= recipe.least_accuracy
        and (value := rank(entry, recipe.select)) is not None
    }


def rank(entry: dict[str, float], select: str) -> float | None:
    """Return the number by which :attr:`Recipe.select` compares an epoch, of which more is better.

    None where it was not measured. An epoch at chance, which nothing fools where one class is frequent, has less than
    0, and any other 0 to 1.
    """
    if select == "best":
        value = entry.get("validation_mean_iou", entry[ACCURACY])
    elif "validation_uer" not in entry:
        return None
    else:
        universal, per_image = 1 - entry["validation_uer"], entry["validation_pgd_accuracy"]
        value = {
            "best-universal": universal,
            "best-pgd": per_image,
            "best-robust": (universal + per_image) / 2,
        }[select]
    return value - 1 - 1e-9 if _at_chance(entry) else value
