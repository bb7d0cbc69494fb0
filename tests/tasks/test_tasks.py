"""Both tasks by hand: which units count, what they cost, when they are right, and when an attack has succeeded."""

import math
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch

from gambeson import tasks
from gambeson.attacks import PGD
from gambeson.base import UserError
from gambeson.data import Split, as_split
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


def test_the_answer_is_the_first_of_the_largest_logits():
    logits = torch.randint(3, (5, 4, 6, 7), generator=torch.Generator().manual_seed(0)).float()  # with many ties
    assert torch.equal(tasks.answers(logits), logits.argmax(1))
    assert torch.equal(tasks.answers(logits[:, :, 0, 0]), logits[:, :, 0, 0].argmax(1))


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


def test_a_split_takes_a_task_by_name_and_refuses_one_that_does_not_fit_its_labels():
    images = torch.zeros(3, 1, 2, 2)
    maps = torch.tensor([[[0, 1], [1, 0]]] * 3)
    assert Split("a", images, maps, task="segmentation").task == Segmentation()
    assert Split("a", images, maps[:, 0, 0], task="classification").task == CLASSIFICATION
    for labels, task, words in (
        (maps[:, 0, 0], Segmentation(), r"labels have shape \(3,\): expected label maps"),
        (maps, CLASSIFICATION, r"labels have shape \(3, 2, 2\): expected one label per image"),
        (maps, Segmentation, "task is .*expected a task such as"),
        (maps, 3, "task is 3"),
        (maps, "segmentations", "did you mean segmentation"),
    ):
        with pytest.raises(UserError, match=words):
            Split("a", images, labels, task=task)
    with pytest.raises(UserError, match="expected label maps"):
        PGD(eps=0.1)(torch.nn.Conv2d(1, 2, 1), images, maps[:, 0, 0], task=Segmentation())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("label_dims: ClassVar[int] = 2\n    label_form: ClassVar[str] = 'x'", "does not define units"),
        ("def units(self, values): return values", "does not define label_dims and label_form"),
    ],
)
def test_an_unfinished_task_is_refused_by_name(tmp_path, body, words):
    file = tmp_path / "mine.py"
    file.write_text(f"from typing import ClassVar\nimport gambeson as gb\nclass Mine(gb.tasks.Task):\n    {body}\n")
    with pytest.raises(UserError, match=words):
        tasks.create(f"{file}:Mine")


def test_a_task_of_one_s_own_gets_its_labels_as_they_are():
    class MultiLabel(Classification):
        """More than one class per image: an answer is right where it is one of them."""

        label_dims: ClassVar[int] = 2
        label_form: ClassVar[str] = "one row of classes per image (N, K)"

    images, rows = torch.zeros(3, 1, 2, 2), torch.tensor([[1, 0], [0, 1], [0, 1]])  # not read as one-hot
    assert Split("a", images, rows, task=MultiLabel()).labels.tolist() == rows.tolist()
    with pytest.raises(UserError, match="expected one row of classes"):
        Split("a", images, rows[:, 0], task=MultiLabel())


def masks(foreground: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(12, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    return images, ((images[:, 0] > 0.5) * foreground).to(torch.uint8)


class Stored(torch.utils.data.Dataset):
    """Images with masks as files hold them."""

    def __init__(self, images: torch.Tensor, maps: torch.Tensor) -> None:
        self.pairs = images, maps

    def __len__(self) -> int:
        return 12

    def __getitem__(self, k: int) -> tuple[torch.Tensor, np.ndarray]:
        return self.pairs[0][k], self.pairs[1][k].numpy()


@pytest.mark.parametrize("form", [lambda *pair: pair, Stored])
def test_masks_of_0_and_255_are_two_classes_and_said_so(form):
    images, maps = masks(255)
    with pytest.warns(UserWarning, match="255 is read as class 1, a foreground"):
        split = as_split(form(images, maps))
    assert (split.classes, split.ignore_index) == (("0", "1"), None)
    assert torch.equal(split.take(slice(None))[1], (images[:, 0] > 0.5).long())
    maps[0, 0] = 1  # with a third value 255 marks what has no label
    split = as_split(form(images, maps))
    assert (split.classes, split.ignore_index) == (("0", "1"), 255)
    assert torch.equal(split.take(slice(None))[1], maps.long())


def test_a_mark_of_unlabelled_pixels_is_never_read_as_a_class_where_an_attack_is_given_it():
    images, maps = masks(255)
    model = torch.nn.Conv2d(1, 2, 1)
    with pytest.raises(UserError, match=r"if 255 marks what has no label, give task=.*ignore_index=255.*labels == 255"):
        PGD(eps=0.1)(model, images, maps)
    assert Split("a", images, maps, ignore_index=255).ignore_index == 255
    found = PGD(eps=0.1)(model, images, maps, task=Segmentation(ignore_index=255))
    assert not torch.equal(found, images)


def test_labels_that_start_at_1_are_said_so_and_gaps_are_not():
    images = torch.zeros(6, 1, 2, 2)
    with pytest.warns(UserWarning, match="labels run from 1 to 3: .*pass labels - 1"):
        assert Split("a", images, torch.tensor([1, 2, 3, 1, 2, 3])).classes == ("0", "1", "2", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Split("a", images, torch.tensor([7, 2, 2, 7, 2, 2])).classes) == 8
        assert len(Split("a", images, torch.tensor([1, 1, 1, 1, 1, 1])).classes) == 2
    with pytest.raises(UserError, match="labels reach 20240131: expected class indices"):
        Split("a", images, torch.tensor([7, 20240131, 2, 7, 2, 2]))


def test_counts_of_nothing_have_no_rate():
    nothing = torch.zeros(2, dtype=torch.long)
    assert Counts(nothing, nothing).accuracy.n == 0
    assert isinstance(PIXELS, Task)


def test_bytes_of_fewer_bits_are_said_to_be_nearly_black():
    bits = torch.randint(0, 2, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with pytest.warns(UserWarning, match=r"no pixel of a is above 1 of 255.*images.float\(\) / 1"):
        Split("a", bits, torch.arange(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Split("a", bits * 255, torch.arange(6))
        Split("a", bits * 0, torch.arange(6))
