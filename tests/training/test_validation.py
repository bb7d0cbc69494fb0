"""Validation: when a model is no better than chance, however frequent one class is."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.defenses import Standard
from gambeson.training import Recipe
from gambeson.training.validation import chance_level, is_best, is_due, validate


class Says(nn.Module):
    """Gives the class that is written into every image."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return 9 * nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), self.classes).float()


def judged(labels, said, classes=2):
    """What a model is at chance by that says ``said`` where ``labels`` are right, and its entry."""
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(said)
    split = gb.data.Split("validation", images, torch.tensor(labels), tuple("abcdefghij"[:classes]))
    entry = validate(Says(classes), gb.data.Dataset("said", split, split, split, split.classes))
    return chance_level(entry, split), entry


def rare(frequent, few, found, alarms=0):
    """A rare class of which some are found, with false alarms."""
    return [0] * frequent + [1] * few, [1] * alarms + [0] * (frequent - alarms) + [1] * found + [0] * (few - found)


@pytest.mark.parametrize(
    ("case", "learnt"),
    [
        (rare(18, 2, 2), True),  # 90 % of 20 images
        (rare(18, 2, 0), False),
        (rare(18, 2, 1, 8), False),
        (rare(297, 3, 3), True),  # 99 % of 300
        (rare(297, 3, 3, 2), True),
        (rare(297, 3, 2), True),
        (rare(297, 3, 0), False),
        (rare(35, 1, 1), True),
        (rare(35, 1, 1, 17), False),  # half of all images are called rare
        (rare(3, 1, 1), True),
        (rare(100, 100, 100, 90), False),  # as often as by chance, in balanced data too
        (rare(100, 100, 100, 60), True),
    ],
)
def test_one_answer_for_all_is_at_chance_and_a_model_that_finds_the_rare_class_is_not(case, learnt):
    said, entry = judged(*case)
    labels, answers = map(torch.tensor, case)
    shares = [float((answers[labels == k] == k).float().mean()) for k in (0, 1)]
    assert entry["validation_balanced_accuracy"] == pytest.approx(sum(shares) / 2)
    assert entry["validation_accuracy"] == pytest.approx(float((answers == labels).float().mean()))
    assert bool(said) != learnt
    if said:
        assert (
            f"the most frequent class alone is {100 * float((labels == labels.mode().values).float().mean()):.1f} %"
            in said
        )


def test_of_ten_classes_chance_is_two_errors_above_a_tenth():
    labels = list(range(10)) * 40
    for right, learnt in ((12, False), (14, True)):  # of each 100; two errors are 3 points
        said = [k if i < right * 4 else (k + 1) % 10 for i, k in enumerate(labels)]
        found, entry = judged(labels, said, 10)
        assert entry["validation_balanced_chance"] == pytest.approx(0.13, abs=0.002)
        assert bool(found) != learnt


def test_an_epoch_at_chance_is_taken_only_where_all_are():
    constant, good = judged(*rare(18, 2, 0))[1], judged(*rare(18, 2, 2, 2))[1]
    still = {"validation_uer": 0.1, "validation_pgd_accuracy": 0.9}
    fooled = {"validation_uer": 0.5, "validation_pgd_accuracy": 0.1}
    for select in ("best", "best-universal", "best-pgd", "best-robust"):
        recipe = Recipe(select=select, robust_every=1)
        history = [constant | still, good | fooled, constant | still]
        assert [is_best(history[: k + 1], recipe, Standard()) for k in range(3)] == [True, True, False]


def test_the_first_epoch_that_is_accurate_enough_is_attacked():
    look = {"validation_uer": 0.1, "validation_pgd_accuracy": 0.9}

    def due(accuracies, least, every=3):
        recipe, history = Recipe(epochs=8, select="best-robust", robust_every=every, least_accuracy=least), []
        for accuracy in accuracies:
            history.append({"validation_accuracy": accuracy})
            history[-1] |= look if is_due(history, recipe, Standard()) else {}
        return [k for k, entry in enumerate(history) if look.items() <= entry.items()]

    assert due([0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 0.9) == [1, 2, 5, 7]
    assert due([0.8, 0.8, 0.8, 0.8, 0.9], 0.9) == [2, 4]
    assert due([0.8, 0.8, 0.8, 0.8, 0.9], 0.0) == [2]
    assert due([0.9, 0.9], 0.9, every=1) == [0, 1]
    assert not is_due([{"validation_accuracy": 1.0}], Recipe(epochs=1), Standard())
