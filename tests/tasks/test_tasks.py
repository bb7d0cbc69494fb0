"""Both tasks by hand: which units count, what they cost, when they are right, and when an attack has succeeded."""

import math

import pytest
import torch

from gambeson import tasks
from gambeson.base import UserError
from gambeson.data import Split
from gambeson.tasks import CLASSIFICATION, Classification, Counts, Segmentation, Task

IMAGES = Classification(ignore_index=9)
PIXELS = Segmentation(ignore_index=9)

LABELS = torch.tensor([0, 9, 2, 1])
PREDICTIONS = torch.tensor([0, 0, 1, 1])
"""Right, does not count, wrong, right."""

MAPS = torch.tensor([[[0, 1], [9, 2]], [[9, 9], [9, 9]], [[1, 1], [1, 9]]])
ANSWERS = torch.tensor([[[0, 2], [0, 2]], [[0, 1], [2, 0]], [[2, 0], [0, 1]]])
"""Two of three pixels right; nothing counts; none of three right."""


def one_hot(predictions: torch.Tensor, height: float = 1.0) -> torch.Tensor:
    """Logits (N, 3, ...) that are ``height`` at the prediction and 0 elsewhere."""
    return height * torch.nn.functional.one_hot(predictions, 3).movedim(-1, 1).float()


def test_units_that_count():
    assert IMAGES.valid(LABELS).tolist() == [True, False, True, True]
    assert Classification().valid(LABELS).all()
    assert IMAGES.labelled(LABELS).tolist() == [True, False, True, True]
    assert PIXELS.valid(MAPS).flatten(1).tolist() == [
        [True, True, False, True],
        [False, False, False, False],
        [True, True, True, False],
    ]
    assert PIXELS.labelled(MAPS).tolist() == [True, False, True]
    assert Segmentation().labelled(MAPS).tolist() == [True, True, True]


def test_counts_and_the_headline_rate_of_classification():
    counts = IMAGES.counts(PREDICTIONS, LABELS)
    assert counts.right.tolist() == [1, 0, 0, 1]
    assert counts.total.tolist() == [1, 0, 1, 1]
    assert (counts.errors, counts.images) == (1, 3)
    assert counts.shares.tolist() == [1.0, 0.0, 1.0]
    # Wilson's interval of 2 of 3, by his formula with z = 1.96.
    z, p, n = 1.959963984540054, 2 / 3, 3
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert counts.accuracy.value == 2 / 3
    assert counts.accuracy.n == 3
    assert counts.accuracy.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert counts.accuracy.high == pytest.approx((centre + half) / (1 + z * z / n))


def test_counts_and_the_headline_rate_of_segmentation():
    counts = PIXELS.counts(ANSWERS, MAPS)
    assert counts.right.tolist() == [2, 0, 0]
    assert counts.total.tolist() == [3, 0, 3]
    assert (counts.errors, counts.images) == (4, 2)
    assert counts.shares.tolist() == [2 / 3, 0.0]
    assert counts.accuracy.value == 2 / 6  # the rate is over pixels,
    assert counts.accuracy.n == 2  # and its interval over images that have a labelled one


def test_a_prediction_of_the_ignored_class_is_never_right():
    counts = Classification(ignore_index=1).counts(PREDICTIONS, LABELS % 9)
    assert (counts.right.tolist(), counts.total.tolist()) == ([1, 1, 0, 0], [1, 1, 1, 0])


def test_predictions_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"answers with shape \(4,\), but the labels have \(3, 2, 2\)"):
        PIXELS.counts(PREDICTIONS, MAPS)


def test_an_image_is_adversarial_once_no_unit_that_counts_is_right():
    assert IMAGES.is_adversarial(one_hot(PREDICTIONS), LABELS).tolist() == [False, True, True, False]
    assert PIXELS.is_adversarial(one_hot(ANSWERS), MAPS).tolist() == [False, True, True]
    nearly = MAPS.clone()
    nearly[2, 1, 0] = 0  # one labelled pixel of the third image is right now
    assert PIXELS.is_adversarial(one_hot(ANSWERS), nearly).tolist() == [False, True, False]


def test_a_targeted_attack_succeeds_where_every_unit_that_counts_reaches_its_target():
    targets = torch.tensor([0, 9, 1, 2])
    assert IMAGES.is_adversarial(one_hot(PREDICTIONS), targets, targeted=True).tolist() == [True, True, True, False]
    reached = torch.where(MAPS == 9, MAPS, ANSWERS)
    assert PIXELS.is_adversarial(one_hot(ANSWERS), reached, targeted=True).tolist() == [True, True, True]
    reached[0, 0, 0] = 2
    assert PIXELS.is_adversarial(one_hot(ANSWERS), reached, targeted=True).tolist() == [False, True, True]


def test_targets_stay_the_ignore_index_where_the_label_is():
    assert IMAGES.targets(torch.tensor([1, 1, 1, 1]), LABELS).tolist() == [1, 9, 1, 1]
    assert Classification().targets(torch.tensor([1, 1, 1, 1]), LABELS).tolist() == [1, 1, 1, 1]
    assert PIXELS.targets(torch.full_like(MAPS, 2), MAPS)[0].tolist() == [[2, 2], [9, 2]]
    assert PIXELS.indexable(MAPS)[0].tolist() == [[0, 1], [0, 2]]


def test_cross_entropy_of_units_and_its_mean_per_image():
    logits = one_hot(PREDICTIONS, math.log(2))  # probabilities 1/2, 1/4, 1/4
    half, quarter = math.log(2), math.log(4)
    losses = IMAGES.cross_entropy(logits, LABELS)
    assert losses.tolist() == pytest.approx([half, 0, quarter, half])
    assert IMAGES.per_image(losses, LABELS).tolist() == losses.tolist()
    assert IMAGES.per_image(torch.full((4,), 3.0), LABELS).tolist() == [3, 0, 3, 3]
    losses = PIXELS.cross_entropy(one_hot(ANSWERS, math.log(2)), MAPS)
    assert losses[0].flatten().tolist() == pytest.approx([half, quarter, 0, half])
    assert PIXELS.per_image(losses, MAPS).tolist() == pytest.approx([(2 * half + quarter) / 3, 0, quarter])
    # Ignored units leave the mean even where the values come from elsewhere.
    assert PIXELS.per_image(torch.full(MAPS.shape, 3.0), MAPS).tolist() == [3, 0, 3]


def test_label_smoothing_spreads_the_target():
    logits, labels = one_hot(torch.tensor([0]), math.log(2)), torch.tensor([0])
    expected = 0.7 * math.log(2) + 0.3 * (math.log(2) + 2 * math.log(4)) / 3
    found = CLASSIFICATION.cross_entropy(logits, labels, label_smoothing=0.3)
    assert found.tolist() == [pytest.approx(expected)]


def test_ignored_units_have_no_gradient():
    logits = one_hot(ANSWERS).requires_grad_()
    values = PIXELS.per_image(PIXELS.cross_entropy(logits, MAPS), MAPS)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.equal(gradient.abs().sum(1) > 0, MAPS != 9)


def test_labels_without_a_class_are_refused_the_ignore_index_apart():
    PIXELS.check_labels(MAPS, 3)
    with pytest.raises(UserError, match="labels reach from 0 to 9, but there are 3 classes"):
        Segmentation().check_labels(MAPS, 3)
    with pytest.raises(UserError, match="do they start at 1"):
        CLASSIFICATION.check_labels(torch.tensor([1, 2, 3]), 3)
    with pytest.raises(UserError, match="expected integers"):
        CLASSIFICATION.check_labels(torch.tensor([1.0]), 3)


def test_the_form_of_the_labels_decides_the_task():
    assert tasks.of(LABELS, 9) == IMAGES
    assert tasks.of(MAPS) == Segmentation()
    assert tasks.names() == ["classification", "segmentation"]
    assert tasks.create("segmentation", ignore_index=9) == PIXELS
    with pytest.raises(UserError, match=r"labels have shape \(4, 1\)"):
        tasks.of(LABELS[:, None])


def test_values_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"shape \(3, 2, 2\): expected one label per image"):
        Classification().per_image(MAPS.float(), MAPS)
    with pytest.raises(UserError, match=r"shape \(4,\): expected label maps"):
        PIXELS.per_image(LABELS.float(), LABELS)


def test_what_needs_classification_says_so():
    IMAGES.require_classification("this")
    with pytest.raises(UserError, match=r"the labels are label maps .*: this expects one label per image \(N,\); do"):
        PIXELS.require_classification("this", "do that")
    assert (IMAGES.per_image_label, IMAGES.labels_every_image, CLASSIFICATION.labels_every_image) == (True, False, True)
    assert not Segmentation().labels_every_image


def test_a_split_knows_its_task():
    images = torch.zeros(4, 1, 2, 2)
    assert Split("a", images, LABELS, ignore_index=9).task == IMAGES
    assert Split("a", images[:3], MAPS, ignore_index=9).task == PIXELS
    assert Split("a", images, LABELS % 9).subset([1, 2]).task == CLASSIFICATION
    moved = Split("a", images, LABELS, ignore_index=9).with_images(images + 0.5)
    assert (moved.task, moved.labels.tolist(), float(moved.images.mean())) == (IMAGES, LABELS.tolist(), 0.5)


class Coarse(Classification):
    """Classes 0 and 1 are one kind, 2 and 3 another: an answer is right where the kind is."""

    def matches(self, predictions, labels):
        return predictions // 2 == labels // 2


def test_a_task_of_one_s_own_decides_what_is_right():
    split = Split("kinds", torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3]), task=Coarse())
    counts = split.task.counts(torch.tensor([1, 1, 0, 2]), split.labels)
    assert counts.right.tolist() == [1, 1, 0, 1]
    logits = torch.eye(4)[torch.tensor([1, 1, 0, 2])]
    assert split.task.is_adversarial(logits, split.labels).tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="set the task's ignore_index"):
        Split("kinds", torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3]), ignore_index=3, task=Coarse())


def test_counts_of_nothing_have_no_rate():
    nothing = torch.zeros(2, dtype=torch.long)
    assert Counts(nothing, nothing).accuracy.n == 0
    assert isinstance(PIXELS, Task)
