"""Validation between epochs, clean and robust, and selection of the best epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gambeson.attacks import PGD, StochasticPGD
from gambeson.attacks.solver import GradientWarning
from gambeson.base import derive, place, total
from gambeson.data import Dataset, Split
from gambeson.defenses import Defense
from gambeson.training.recipe import Recipe
from gambeson.victim import Victim, nothing_counts, predict, score, vote

_IMAGES = 500


def validate(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Return the clean accuracy."""
    with _one_pass(model) as victim:
        return {"validation_accuracy": 1 - _error(victim, data.validation)}


def warn_at_chance(accuracy: float, split: Split) -> None:
    """Warn if a model is right no more often than one that always says the most frequent class, within two errors."""
    if not split.task.per_image_label:
        return
    counted = split.labels[split.task.valid(split.labels)]
    chance = float(counted.bincount().max()) / len(counted)
    if accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / len(counted)):
        warnings.warn(
            f"the model has not learnt: it gets {100 * accuracy:.1f} % of {split.name} right, and the most frequent "
            f"class alone is {100 * chance:.1f} %; train longer, change the learning rate, or check the labels",
            stacklevel=2,
        )


@contextmanager
def _one_pass(model: nn.Module) -> Iterator[Victim]:
    """Enter a model as a victim; a random one has a single vote, because epochs are only compared."""
    with Victim(model) as victim:
        victim.votes = 1
        yield victim


def _error(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> float:
    """Error rate; every process scores its share of the images."""
    if len(split) == 0:
        raise nothing_counts(split)
    first, step = place()
    own = split.subset(torch.arange(first % len(split), len(split), step))  # with few images, some are scored twice
    found = score(predict(victim, own, delta), own, whole=False)
    errors, answers = total([found.errors, found.total], victim.device)
    if answers == 0:
        raise nothing_counts(split)
    return errors / answers


def validate_robustly(model: nn.Module, data: Dataset, defense: Defense, seed: int) -> dict[str, float]:
    """Return the universal evasion rate and, for one label per image, the accuracy under PGD, at the defence's eps.

    Both use short attacks, to compare epochs: 50 steps of stochastic PGD from zero, and 10 of PGD on the same 500
    images in every epoch. A random model has a single vote per image.
    """
    ball = {"eps": getattr(defense, "eps", None), "norm": getattr(defense, "norm", "inf")}
    if not ball["eps"]:
        return {}
    attack = StochasticPGD(**ball, steps=50, batch_size=128, probe_starts=0, temperature=1.0)
    with warnings.catch_warnings():  # after the first epochs no answer may be as sure as the truncation
        warnings.simplefilter("ignore", GradientWarning)
        universal = attack.craft(model, data, seed=derive(seed, "validation"))
    few = data.validation.sample(_IMAGES, seed=seed)
    with _one_pass(model) as victim:
        delta = universal.delta.to(victim.device)
        found = {"validation_uer": _error(victim, data.validation, delta)}
        images, labels = few.take(slice(None), victim.device)
        if few.task.per_image_label:
            moved = PGD(**ball, steps=10, eot_samples=1)(victim, images, labels, seed=seed, task=few.task)
            counts = few.task.counts(vote(victim, moved), labels)
            found["validation_pgd_accuracy"] = counts.accuracy.value
    return found


def is_best(history: list[dict[str, float]], recipe: Recipe, defense: Defense) -> bool:
    """Whether the last epoch is the best so far by the recipe's rule; an epoch that was not measured is not.

    Nor is one before all parts of the objective were active, such as noise that starts later.
    """
    history = history[defense.fully_active_epoch(recipe.epochs) :]
    key, sign = {
        "best": ("validation_accuracy", 1),
        "best-universal": ("validation_uer", -1),
        "best-pgd": ("validation_pgd_accuracy", 1),
    }[recipe.select]
    values = [sign * entry[key] for entry in history if key in entry]
    return bool(history) and key in history[-1] and values[-1] > max(values[:-1], default=-float("inf"))
