"""Suites on label maps: the worst case of pixel accuracy and mean IoU, chosen from and scored on stored images."""

import warnings
from itertools import product

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PGD, SEA, Square
from gambeson.attacks.solver import GradientWarning
from gambeson.data import Split
from gambeson.evaluation import run_suite, standard_suite
from gambeson.evaluation.segmentation_suite import class_pixels, greedy_choice, lower_bound
from gambeson.tasks import Segmentation
from gambeson.victim import Victim
from tests.attacks.test_segmentation_attacks import Patchwise, Pixelwise, breakable, maps

TASK = Segmentation(ignore_index=255)


def nothing(victim, x, y, **_):
    return x


def split_of(model, **settings):
    x, y = maps(model, **settings)
    return Split("maps", x, y, tuple("abcdefgh"[: model(x[:1]).shape[1]]), task=TASK)


def brief(eps=0.02, queries=60):
    suite = standard_suite(eps=eps, task=TASK, queries=queries)
    return {name: one.model_copy(update={"steps": 30}) if isinstance(one, SEA) else one for name, one in suite.items()}


def plain_mean_iou(predictions, labels, classes):
    """By brute force, over the classes that occur among the labels."""
    valid, found = labels != 255, []
    for k in range(classes):
        own, said = (labels == k) & valid, (predictions == k) & valid
        if own.any():
            found.append(float((own & said).sum() / (own | said).sum()))
    return sum(found) / len(found)


def random_counts(seed, candidates=3, images=6, classes=3):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images, 5, 5), generator=draw)
    wrong = torch.rand(candidates, images, 5, 5, generator=draw) < 0.3 + 0.3 * torch.rand(candidates, images, 1, 1)
    other = torch.randint(0, classes, wrong.shape, generator=draw)
    predictions = torch.where(wrong, other, labels)
    return torch.stack([TASK.confusion(one, labels, classes) for one in predictions])


def iou(counts):
    right, truth, predicted = counts.sum(0).double()
    return (right / (truth + predicted - right))[truth > 0]


def test_the_greedy_choice_is_near_the_best_one_and_above_the_bound():
    excess = []
    for seed in range(12):
        counts = random_counts(seed)
        rows = torch.arange(6)
        every = [iou(counts[torch.tensor(choice), rows]) for choice in product(range(3), repeat=6)]
        best = min(float(one.mean()) for one in every)
        found = float(iou(counts[greedy_choice(counts, seed=seed), rows]).mean())
        bound = lower_bound(counts)
        assert bound == pytest.approx(float(torch.stack(every).amin(0).mean()), abs=1e-12)
        assert bound <= best + 1e-12
        assert best <= found + 1e-12
        assert found <= min(float(iou(one).mean()) for one in counts) + 1e-12
        excess.append(found - best)
    assert max(excess) < 0.005


def test_the_greedy_choice_takes_the_best_of_several_candidates():
    """One image; the last candidate lowers the mean IoU too, but less than the one before."""
    counts = torch.tensor(
        [[[[9, 9], [10, 10], [10, 10]]], [[[1, 9], [10, 10], [2, 18]]], [[[5, 9], [10, 10], [6, 14]]]]
    )
    assert greedy_choice(counts).tolist() == [1]


@pytest.fixture(scope="module")
def found():
    model = Patchwise()
    split = split_of(model, count=12, side=8)
    with Victim(model) as victim:
        return model, split, run_suite(victim, split, brief())


def test_stored_images_score_the_reported_numbers(found):
    model, split, suite = found
    result, classes = suite.result, len(split.classes)
    for images, scored in ((suite.images, "accuracy"), (suite.iou_images, "mean_iou")):
        with torch.no_grad():
            predictions = torch.cat([model(part).argmax(1) for part in images.split(5)])
        valid = split.labels != 255
        right = (predictions == split.labels) & valid
        if scored == "accuracy":
            assert result.robust.value == int(right.sum()) / int(valid.sum())
            shares = right.flatten(1).sum(1) / valid.flatten(1).sum(1)
            assert result.maps.image_accuracy.value == pytest.approx(float(shares.mean()), abs=1e-6)
            assert result.maps.image_accuracy.value != pytest.approx(result.robust.value, abs=1e-6)
        else:
            assert result.maps.mean_iou.value == pytest.approx(plain_mean_iou(predictions, split.labels, classes))
    with torch.no_grad():
        clean = plain_mean_iou(model(split.images).argmax(1), split.labels, classes)
    assert result.maps.clean_mean_iou.value == pytest.approx(clean)
    assert float((suite.images - split.images).abs().max()) <= 0.02 + 1e-6
    assert result.largest == pytest.approx(float((suite.images - split.images).abs().max()))
    moved = (suite.images != split.images).flatten(1).any(1)
    assert torch.equal(moved, suite.broken_by >= 0)
    assert torch.equal((suite.iou_images != split.images).flatten(1).any(1), suite.iou_broken_by >= 0)
    assert moved.any()


def test_the_worst_case_is_at_least_as_bad_as_every_attack_alone(found):
    model, split, suite = found
    result = suite.result
    assert [one.attack for one in result.maps.attacks] == ["sea-mce", "sea-mce-bal", "sea-js", "square"]
    least = torch.full((len(split),), 10**6)
    for (name, attack), one, turn in zip(brief().items(), result.maps.attacks, result.rounds, strict=True):
        alone = run_suite(model, split, {name: attack}).result
        assert result.robust.value <= alone.robust.value
        assert result.maps.mean_iou.value <= min(one.mean_iou.value, alone.maps.mean_iou.value)
        assert alone.robust.value <= one.accuracy.value  # where an attack does no harm the clean image is worse
        with torch.no_grad():
            least = least.minimum(
                TASK.counts(model(run_suite(model, split, {name: attack}).images).argmax(1), split.labels).right
            )
        assert turn.tried == 12
    assert result.robust.value == int(least.sum()) / int((split.labels != 255).sum())
    assert result.robust.value < result.clean.value
    assert result.maps.mean_iou_bound <= result.maps.mean_iou.value < result.maps.clean_mean_iou.value
    assert result.success.value == pytest.approx(1 - result.robust.value / result.clean.value)
    assert result.robust.low < result.robust.value < result.robust.high


def test_two_classes_come_to_the_exact_worst_case_of_both_numbers():
    model = Pixelwise(2)
    split = split_of(model, side=12)
    result = run_suite(model, split, brief(eps=0.06)).result
    broken = breakable(model, split.images, split.labels, 0.06)
    valid = split.labels != 255
    assert result.robust.value == int((valid & ~broken).sum()) / int(valid.sum())
    index = split.labels.where(valid, 0)
    assert result.maps.mean_iou.value == pytest.approx(
        plain_mean_iou(torch.where(broken, 1 - index, index), split.labels, 2)
    )


def test_no_attack_changes_nothing():
    model = Patchwise()
    split = split_of(model)
    for attacks in ({}, {"nothing": nothing, "again": nothing}):
        suite = run_suite(model, split, attacks)
        result = suite.result
        assert result.clean == result.robust == gb.evaluation.accuracy(model, split)
        assert result.maps.clean_mean_iou == result.maps.mean_iou == gb.evaluation.mean_iou(model, split)
        assert result.success.value == 0
        assert set(suite.broken_by.tolist()) == {-1}
        assert torch.equal(suite.iou_images, split.images)


def test_images_without_a_right_pixel_are_left_and_ignored_ones_are_not_tried():
    model = Pixelwise(2)
    x, y = maps(model, count=5, side=4, wrong=0)
    y[1] = 255
    y[2] = torch.where(y[2] == 255, 255, 1 - y[2])  # all wrong as they are
    split, seen = Split("maps", x, y, ("a", "b"), task=TASK), []

    def flips(victim, x, y, **_):
        seen.append(len(x))
        return 1 - x

    suite = run_suite(model, split, {"flips": flips, "nothing": nothing})
    assert seen == [3]
    assert suite.broken_by[1:3].tolist() == [-3, -1]
    first, second = suite.result.rounds
    assert second.tried == 3 - first.broken
    # What the second attack was not tried on is as the first left it.
    assert suite.result.maps.attacks[1].accuracy.value >= suite.result.robust.value
    with pytest.raises(UserError, match="has no label that counts"):
        run_suite(model, Split("maps", x, torch.full_like(y, 255), ("a", "b"), task=TASK), {"nothing": nothing})


class Noisy(nn.Module):
    """Each pixel is right with probability 0.69 on a draw, and nearly always by the majority of 21."""

    def forward(self, x):
        margin = 2 * x[:, 0]
        return torch.stack([margin + 2 * torch.randn_like(margin), torch.zeros_like(margin)], 1)


def test_a_random_model_is_decided_by_votes_that_did_not_choose():
    x = torch.full((40, 1, 4, 4), 0.5)
    split = Split("maps", x, torch.zeros(40, 4, 4, dtype=torch.long), ("a", "b"))
    torch.manual_seed(0)
    result = run_suite(Noisy(), split, {str(k): nothing for k in range(6)}).result
    assert result.votes == 21
    assert result.clean.value > 0.9
    # Seven equal candidates are compared, and the choice of the unluckiest of them does not show in the number.
    assert result.robust.value == pytest.approx(result.clean.value, abs=0.03)
    unlucky = min(one.accuracy.value for one in result.maps.attacks)
    assert unlucky == pytest.approx(result.clean.value, abs=0.03)
    broken = run_suite(Noisy(), split, {"pgd": PGD(eps=0.5, steps=5, eot_samples=20)}).result
    assert broken.robust.value < 0.8 * broken.clean.value
    assert broken.maps.mean_iou.value < 0.8 * broken.maps.clean_mean_iou.value


class Rounded(nn.Module):
    """A net behind a rounded input: its gradient is zero everywhere, and it is no more robust than the net."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x - (x - (x * 50).round() / 50).detach() - (x - x.detach()))


def test_a_masked_gradient_shows_beside_square():
    model = Pixelwise(3)
    masked, split = Rounded(model), split_of(model, side=6)
    sea, square = standard_suite(eps=0.2, task=TASK, faithful=True), {"square": Square(eps=0.2, queries=200)}
    assert list(sea) == ["sea-mce", "sea-mce-bal", "sea-js"]
    sea = {name: one.model_copy(update={"steps": 10}) for name, one in sea.items()}
    with pytest.warns(GradientWarning, match="exactly zero"):
        result = run_suite(masked, split, sea | square).result
    by_gradient, by_queries = result.rounds[2].accuracy.value, result.robust.value
    assert by_queries < by_gradient - 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where a gradient is zero because nothing is left to turn, none is due
        run_suite(model, split, {name: one.model_copy(update={"eps": 1.0}) for name, one in sea.items()})


def test_class_pixels_are_those_of_the_labels_that_count():
    model = Pixelwise(3)
    split = split_of(model, count=9)
    assert class_pixels(split) == tuple(int((split.labels == k).sum()) for k in range(3))
    assert sum(class_pixels(split, images=4)) == int((split.sample(4).labels != 255).sum())
    suite = standard_suite(eps=0.1, task=TASK, class_pixels=class_pixels(split))
    assert suite["sea-mce-bal"].class_pixels == tuple(map(float, class_pixels(split)))
