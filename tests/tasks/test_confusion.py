"""Mean IoU and pixel accuracy from the confusion counts of each image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson.base import UserError
from gambeson.tasks import Classification, Confusion, Counts, Difference, Rate, Segmentation

TASK = Segmentation(ignore_index=255)
NAMES = tuple("abcdefg")


def confused(predictions, labels, classes=4):
    return Confusion(TASK.confusion(predictions, labels, classes), NAMES[:classes])


def brute_force(predictions, labels, classes):
    """IoU and accuracy of every class with a label, pixel by pixel."""
    pairs = [(int(p), int(t)) for p, t in zip(predictions.flatten(), labels.flatten(), strict=True) if t != 255]
    iou, recall = {}, {}
    for k in range(classes):
        truth = sum(t == k for _, t in pairs)
        if truth:
            both = sum(p == t == k for p, t in pairs)
            iou[NAMES[k]] = both / sum(k in pair for pair in pairs)
            recall[NAMES[k]] = both / truth
    return iou, recall, sum(p == t for p, t in pairs) / max(1, len(pairs))


@st.composite
def made(draw):
    images, classes = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    labels = torch.randint(draw(st.integers(1, classes)), (images, 3, 4), generator=generator)
    predictions = torch.randint(-1, classes, (images, 3, 4), generator=generator)
    right = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return labels.where(right, predictions), labels.where(~ignored, 255), classes


@settings(max_examples=60, deadline=None)
@given(made(), st.randoms())
def test_every_metric_equals_brute_force_in_any_order(maps, shuffler):
    predictions, labels, classes = maps
    found = confused(predictions, labels, classes)
    iou, recall, accuracy = brute_force(predictions, labels, classes)
    assert {name: rate.value for name, rate in found.iou.items()} == pytest.approx(iou)
    assert found.mean_iou.value == pytest.approx(sum(iou.values()) / max(1, len(iou)))
    assert found.mean_accuracy.value == pytest.approx(sum(recall.values()) / max(1, len(recall)))
    assert found.accuracy.value == pytest.approx(accuracy)
    assert found.mean_iou.value <= found.mean_accuracy.value
    assert found.accuracy == TASK.counts(predictions, labels).accuracy
    for metric in ("accuracy", "mean_iou", "mean_accuracy"):
        rate = getattr(found, metric)
        assert rate.value == found.value(metric)
        assert rate.low <= rate.value <= rate.high
        assert found.drop(found, metric).value == 0
    order = list(range(len(labels)))
    shuffler.shuffle(order)
    again = confused(predictions[order], labels[order], classes)
    assert (again.mean_iou, again.iou, again.accuracy) == (found.mean_iou, found.iou, found.accuracy)


@given(made())
def test_ignored_pixels_change_nothing(maps):
    predictions, labels, classes = maps
    other = torch.where(labels == 255, (predictions + 1) % classes, predictions)
    assert torch.equal(confused(predictions, labels, classes).counts, confused(other, labels, classes).counts)


def test_a_class_that_is_only_predicted_does_not_join_the_mean():
    labels = torch.tensor([[[0, 0, 1, 1]]])
    clean = confused(labels, labels)
    fooled = confused(torch.tensor([[[0, 3, 3, 1]]]), labels)
    assert (clean.mean_iou.value, list(clean.iou)) == (1, ["a", "b"])
    assert (fooled.mean_iou.value, list(fooled.iou)) == (0.5, ["a", "b"])  # with class d it would be a third
    assert fooled.mean_iou == confused(torch.tensor([[[0, -1, -1, 1]]]), labels).mean_iou


def test_data_set_iou_is_not_the_mean_over_images():
    labels = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    found = confused(torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]]), labels)
    assert found.iou["a"].value == 4 / 5
    assert found.iou["b"].value == 3 / 4
    assert (found.iou["a"].n, found.iou["b"].n) == (2, 1)
    assert found.mean_iou.value == pytest.approx((4 / 5 + 3 / 4) / 2)


def test_the_ratio_of_two_classes_has_the_interval_of_its_rate():
    """Of one class alone, IoU is accuracy, and of one pixel per image it is that of independent trials."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.zeros(60, 5, 5, dtype=torch.long)
    predictions = (torch.rand(60, 5, 5, generator=draw) < torch.rand(60, 1, 1, generator=draw)).long()
    found = confused(predictions, labels)
    assert found.mean_iou.effective == pytest.approx(found.accuracy.effective, rel=0.1)
    assert found.mean_iou.low == pytest.approx(found.accuracy.low, abs=0.003)
    single = confused(predictions[:, :1, :1], labels[:, :1, :1])
    right = int((predictions[:, 0, 0] == 0).sum())
    assert single.accuracy == single.iou["a"] == Rate.of(right, 60)
    images = Classification().confusion(predictions[:, 0, 0], labels[:, 0, 0], 4)
    assert torch.equal(images, single.counts)


def scenes(count, draw, size=12, right=0.8):
    """Maps of three classes, of which one is in a third of the images, and predictions whose quality differs."""
    labels = torch.zeros(count, size, size, dtype=torch.long)
    for k, share in ((1, 0.9), (2, 0.33)):
        there = torch.rand(count, generator=draw) < share
        height = torch.randint(3, size, (count, 1, 1), generator=draw)
        band = (torch.arange(size)[None, :, None] < height) & there[:, None, None]
        labels[band.expand_as(labels) if k == 1 else band.transpose(1, 2).expand_as(labels)] = k
    quality = right + 0.15 * torch.randn(count, 1, 1, generator=draw)
    hit = torch.rand(labels.shape, generator=draw) < quality
    return labels.where(hit, torch.randint(3, labels.shape, generator=draw)), labels


def test_the_intervals_of_the_mean_iou_and_of_a_class_in_few_images_cover():
    draw = torch.Generator().manual_seed(3)
    every = confused(*scenes(20000, draw), 3)
    made = [confused(*scenes(30, draw), 3) for _ in range(200)]
    for truth, rates in (
        (every.value("mean_iou"), [one.mean_iou for one in made]),
        (every.iou["c"].value, [one.iou["c"] for one in made]),
    ):
        assert 0.91 <= sum(rate.low <= truth <= rate.high for rate in rates) / 200 <= 0.985
        scatter = float(torch.tensor([rate.value for rate in rates]).std())
        assert sum(rate.high - rate.low for rate in rates) / 200 < 1.25 * 3.92 * scatter


def test_paired_differences_cover_and_are_narrower_than_unpaired_ones():
    draw = torch.Generator().manual_seed(4)

    def both(count):
        before, labels = scenes(count, draw)
        harmed = torch.rand(count, 1, 1, generator=draw) < 0.2
        fooled = torch.rand(labels.shape, generator=draw) < 0.4
        return confused(before, labels, 3), confused(before.where(~(harmed & fooled), 0), labels, 3)

    before, after = both(20000)
    truth = before.value("mean_iou") - after.value("mean_iou")
    assert truth > 0.02
    pairs = [both(40) for _ in range(150)]
    drops = [one.drop(other) for one, other in pairs]
    assert 0.9 <= sum(drop.low <= truth <= drop.high for drop in drops) / 150 <= 0.99
    wide = [one.mean_iou.high - one.mean_iou.low + other.mean_iou.high - other.mean_iou.low for one, other in pairs]
    assert sum(drop.high - drop.low for drop in drops) < 0.5 * sum(wide)
    order = torch.randperm(40, generator=draw)
    one, other = (Confusion(found.counts[order], found.classes) for found in pairs[0])
    assert one.drop(other) == drops[0]
    assert drops[0].value == pytest.approx(-pairs[0][1].drop(pairs[0][0]).value)


def test_what_changes_nothing_makes_a_difference_of_exactly_zero():
    found = confused(*scenes(25, torch.Generator().manual_seed(5)), 3)
    drop = found.drop(found)
    assert drop == Difference(value=0, low=-Rate.of(0, 25).high, high=Rate.of(0, 25).high, n=25)
    one = Confusion(found.counts[:1], found.classes)
    assert (one.drop(one).low, one.drop(one).high) == (-1, 1)
    with pytest.raises(UserError, match="expected those of one split"):
        found.drop(Confusion(found.counts.flip(0), found.classes))
    with pytest.raises(UserError, match="metric = 'dice': expected one of accuracy, mean_iou, mean_accuracy"):
        found.drop(found, "dice")


def test_counts_above_two_to_the_24_are_exact_and_many_classes_fit():
    counts = torch.zeros(2, 3, 2, dtype=torch.long)
    counts[:, 0] = torch.tensor([[2**24 + 1, 1], [2**24, 1]])
    counts[:, 1] = torch.tensor([[2**24 + 1, 1], [2**24 + 1, 1]])
    counts[:, 2] = counts[:, 0]
    found = Confusion(counts, ("a", "b"))
    assert found.iou["a"].value == (2**25 + 1) / (2**25 + 2)
    assert found.mean_iou.value == pytest.approx(1 - 0.5 / (2**25 + 2), abs=1e-12)
    assert found.mean_iou.value < 1
    many = torch.randint(0, 50, (2000, 3, 151), generator=torch.Generator().manual_seed(6))
    many[:, 1:] += many[:, :1]
    assert Confusion(many, tuple(map(str, range(151)))).mean_iou.n == 2000


def test_other_shapes_and_labels_are_refused():
    maps = torch.zeros(2, 3, 3, dtype=torch.long)
    with pytest.raises(UserError, match="the model answers with shape"):
        TASK.confusion(maps[:1], maps, 2)
    with pytest.raises(UserError, match="labels reach from 5 to 5, but there are 2 classes"):
        TASK.confusion(maps, maps + 5, 2)
    nothing = confused(maps, maps + 255)
    assert (nothing.mean_iou, nothing.accuracy, nothing.iou) == (Rate.of(0, 0), Rate.of(0, 0), {})
    assert Counts(maps[:, 0, 0], maps[:, 0, 0]).error_rate == Rate.of(0, 0)
