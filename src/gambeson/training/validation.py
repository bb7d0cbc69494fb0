"""What is measured on the validation split between epochs, and which epoch is the best by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gambeson.attacks import PGD, StochasticPGD
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


@contextmanager
def _one_pass(model: nn.Module) -> Iterator[Victim]:
    """Hold a model frozen; a random one is decided by one pass per image, for epochs are only compared."""
    with Victim(model) as victim:
        victim.votes = 1
        yield victim


def _error(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> float:
    """Rate of wrong answers; every process looks at its share of the images."""
    if len(split) == 0:
        raise nothing_counts(split)
    first, step = place()
    own = split.subset(torch.arange(first % len(split), len(split), step))  # with few images, some are looked at twice
    found = score(predict(victim, own, delta), own, whole=False)
    errors, answers = total([found.errors, found.total], victim.device)
    if answers == 0:
        raise nothing_counts(split)
    return errors / answers


def validate_robustly(model: nn.Module, data: Dataset, defense: Defense, seed: int) -> dict[str, float]:
    """Return the universal evasion rate and, for one label per image, the accuracy under PGD, at the defence's eps.

    Both by short attacks, to compare epochs: 50 steps of stochastic PGD from zero, 10 of PGD on 500 images, the
    same ones in every epoch. A random model is taken as it is, one draw per image.
    """
    ball = {"eps": getattr(defense, "eps", None), "norm": getattr(defense, "norm", "inf")}
    if not ball["eps"]:
        return {}
    universal = StochasticPGD(**ball, steps=50, batch_size=128, probe_starts=0).craft(
        model, data, seed=derive(seed, "validation")
    )
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
    """Whether the last epoch is better than all before by the recipe's rule; one that was not measured is not.

    Nor is one before all of the objective was at work, such as a noise that begins later.
    """
    history = history[defense.fully_active_epoch(recipe.epochs) :]
    key, sign = {
        "best": ("validation_accuracy", 1),
        "best-universal": ("validation_uer", -1),
        "best-pgd": ("validation_pgd_accuracy", 1),
    }[recipe.select]
    values = [sign * entry[key] for entry in history if key in entry]
    return bool(history) and key in history[-1] and values[-1] > max(values[:-1], default=-float("inf"))
