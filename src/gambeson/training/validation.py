"""Validation between epochs, clean and robust, and selection of the best epoch.

Rates of label maps are over pixels; beside them stands the mean IoU.
"""

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
from gambeson.tasks import Confusion
from gambeson.training.recipe import Recipe
from gambeson.victim import Victim, auto_batch_size, nothing_counts, predict, predict_batches, score, vote

_IMAGES = 500
ACCURACY = "validation_accuracy"


def validate(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Return the clean accuracy and, of label maps, the mean IoU."""
    with _one_pass(model) as victim:
        error, iou = _scores(victim, data.validation)
    return {ACCURACY: 1 - error} | ({} if iou is None else {"validation_mean_iou": iou})


def warn_at_chance(last: dict[str, float], split: Split) -> None:
    """Warn if a model is right no more often than one that always says the most frequent class, within two errors.

    Of label maps, if its mean IoU is no more than one over the number of classes: one class for all pixels has no more.

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
    """Return by what a model is no better than chance, as :func:`warn_at_chance` has it; empty if it is better."""
    if "validation_mean_iou" in last:
        found, most = last["validation_mean_iou"], 1 / len(split.classes)
        how = f"its mean IoU on {split.name} is {100 * found:.1f} %, and a single class has up to {100 * most:.1f} %"
        learnt = found > most
    else:
        counted, found = split.labels[split.task.valid(split.labels)], last["validation_accuracy"]
        chance = float(counted.bincount().max()) / len(counted)
        how = f"it gets {100 * found:.1f} % of {split.name} right, and the most frequent class alone is "
        how += f"{100 * chance:.1f} %"
        learnt = found > chance + 2 * math.sqrt(chance * (1 - chance) / len(counted))
    return "" if learnt else how


@contextmanager
def _one_pass(model: nn.Module) -> Iterator[Victim]:
    """Enter a model as a victim; a random one has a single vote, because epochs are only compared."""
    with Victim(model) as victim:
        victim.votes = 1
        yield victim


def _scores(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> tuple[float, float | None]:
    """Error rate and, of label maps, mean IoU; every process scores its share of the images."""
    if len(split) == 0:
        raise nothing_counts(split)
    first, step = place()
    own = split.subset(torch.arange(first % len(split), len(split), step))  # with few images, some are scored twice
    if split.task.per_image_label:
        found = score(predict(victim, own, delta), own, whole=False)
        errors, answers = total([found.errors, found.total], victim.device)
        if answers == 0:
            raise nothing_counts(split)
        return errors / answers, None

    def count(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return split.task.confusion(predictions, labels, len(split.classes)).sum(0)

    counts = torch.stack(predict_batches(victim, own, count, delta)).sum(0)
    counts = torch.tensor(total(counts.flatten().tolist(), victim.device)).view(1, *counts.shape)
    if not bool(counts.any()):
        raise nothing_counts(split)
    summed = Confusion(counts, split.classes)
    return 1 - summed.value("accuracy"), summed.value("mean_iou")


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
        uer, iou = _scores(victim, data.validation, delta)
        found = {"validation_uer": uer} | ({} if iou is None else {"validation_uap_mean_iou": iou})
        attack, right, counted = PGD(**ball, steps=10, eot_samples=1), 0, 0
        size = auto_batch_size(few.shape, len(few), 2**21 if few.task.per_image_label else 2**22)
        for images, labels in few.batches(size, device=victim.device):
            counts = few.task.counts(vote(victim, attack(victim, images, labels, seed=seed, task=few.task)), labels)
            right, counted = right + int(counts.right.sum()), counted + int(counts.total.sum())
    return found | {"validation_pgd_accuracy": right / max(1, counted)}


def is_best(history: list[dict[str, float]], recipe: Recipe, defense: Defense) -> bool:
    """Whether the last epoch is the best so far by the recipe's rule; an epoch that was not measured is not.

    Nor is one before all parts of the objective were active, such as noise that starts later.
    """
    entries = history[defense.fully_active_epoch(recipe.epochs) :]
    ranks = [rank(entry, recipe.select) if entry[ACCURACY] >= recipe.least_accuracy else None for entry in entries]
    found = [value for value in ranks if value is not None]
    return bool(found) and ranks[-1] is not None and found[-1] > max(found[:-1], default=-math.inf)


def rank(entry: dict[str, float], select: str) -> float | None:
    """Return the number by which :attr:`Recipe.select` compares an epoch, of which more is better.

    None where it was not measured.
    """
    if select == "best":
        return entry.get("validation_mean_iou", entry[ACCURACY])
    if "validation_uer" not in entry:
        return None
    universal, per_image = 1 - entry["validation_uer"], entry["validation_pgd_accuracy"]
    return {
        "best-universal": universal,
        "best-pgd": per_image,
        "best-robust": (universal + per_image) / 2,
    }[select]
