"""Rates of each class and the AUC: against counts by hand, scikit-learn, and simulated coverage."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import ClasswiseStochasticPGD, StochasticPGD
from gambeson.base import generator
from gambeson.evaluation import Rate, area_under_curve, by_class
from tests.conftest import binary, inner_images


def test_rates_of_each_class_are_counted_by_hand(trained, digits):
    uap = StochasticPGD(eps=0.15, steps=40, probe_starts=0).craft(trained, digits)
    attack = ClasswiseStochasticPGD(eps=0.15, steps=30, restarts=1)
    found = by_class(trained, digits, uap, attack.craft_classes(trained, digits))
    images, labels = digits.test.take(slice(None))
    with torch.no_grad():
        clean, under = (trained(moved).argmax(1) != labels for moved in (images, uap.apply(images)))
    assert [one.name for one in found.classes] == list(digits.classes)
    for k, one in enumerate(found.classes):
        own = labels == k
        assert one.uer == Rate.of(int(under[own].sum()), int(own.sum()), candidates=10)
        assert one.clean == Rate.of(int(clean[own].sum()), int(own.sum()), candidates=10)
        assert one.uer.high - one.uer.low > Rate.of(int(under[own].sum()), int(own.sum())).high - one.uer.low
    assert found.worst.uer.value > found.best.uer.value + 0.2
    # Whoever knows the class does more harm.
    assert sum(one.own.value for one in found.classes) > 1.2 * sum(one.uer.value for one in found.classes)
    assert found.auc is None
    assert "class-wise" in repr(found)
    assert len(found.to_frame()) == 30
    assert [len(trace.y) for trace in found.plot().data] == [10, 10, 10]


def test_auc_of_two_classes_clean_and_perturbed():
    model, _ = binary((1, 4, 6))
    x = inner_images(240, (1, 4, 6))
    with torch.no_grad():
        logits = model(x).diff(dim=1).flatten()
        y = (logits + 0.5 * logits.std() * torch.randn(240, generator=generator(0, "y")) > logits.median()).long()
    data = gb.data.as_dataset((x, y))
    uap = StochasticPGD(eps=0.05, steps=10, probe_starts=0).craft(model, data)
    found = by_class(model, data, uap)
    images, labels = data.test.take(slice(None))
    with torch.no_grad():
        for moved, area in ((images, found.auc.clean), (uap.apply(images), found.auc.perturbed)):
            assert area.value == pytest.approx(roc_auc_score(labels, model(moved).diff(dim=1).flatten()))
            assert area.low < area.value < area.high
            assert area.n == len(data.test)
    # One step along a linear model's weights moves all scores alike: the error grows, and the order stays.
    assert found.auc.perturbed.value == pytest.approx(found.auc.clean.value)
    assert max(one.uer.value - one.clean.value for one in found.classes) > 0.1
    assert found.auc.positive == "1"
    assert "AUC" in repr(found)


def test_the_area_counts_pairs_and_ties():
    draw = generator(0, "scores")
    for _ in range(20):
        scores = torch.randint(0, 6, (40,), generator=draw).double()
        positive = torch.rand(40, generator=draw) < 0.4
        pairs = scores[positive][:, None] - scores[~positive][None]
        expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean()
        assert area_under_curve(scores, positive).value == pytest.approx(float(expected))
        assert area_under_curve(scores, positive).value == pytest.approx(roc_auc_score(positive, scores))


@pytest.mark.parametrize(("shift", "sizes"), [(1.0, (40, 40)), (2.0, (25, 100)), (0.0, (60, 30))])
def test_the_interval_of_the_area_covers(shift, sizes):
    """Normal scores of equal spread have an area of Phi(shift / sqrt 2)."""
    draw, truth = generator(1, "cover"), float(torch.distributions.Normal(0, 1).cdf(torch.tensor(shift / 2**0.5)))
    positive = torch.arange(sum(sizes)) < sizes[0]
    hits, width = 0, 0.0
    for _ in range(400):
        area = area_under_curve(torch.randn(sum(sizes), generator=draw) + shift * positive, positive)
        hits += area.low <= truth <= area.high
        width += (area.high - area.low) / 400
    assert 0.92 <= hits / 400 <= 0.99
    assert width < 3.2 * (truth * (1 - truth) / min(sizes)) ** 0.5  # not by being wide


def test_areas_without_a_wrong_pair_are_not_certain():
    scores = torch.arange(30.0)
    perfect = area_under_curve(scores, scores >= 20)
    assert perfect.value == 1
    assert 0.6 < perfect.low < 0.8  # ten images of the smaller class
    assert area_under_curve(-scores, scores >= 20).high == pytest.approx(1 - perfect.low)
    assert area_under_curve(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([False, False, True])).low < 0.2
    one_sided, broken = (torch.zeros(3), torch.ones(3)), (torch.tensor([0.0, torch.nan]), torch.tensor([1, 0]))
    for scores, positive in (one_sided, broken):
        with pytest.raises(UserError, match="expected numbers of both classes"):
            area_under_curve(scores, positive.bool())


def test_label_maps_are_refused_and_classes_without_images_left_out(trained, digits):
    uap = StochasticPGD(eps=0.15, steps=2, probe_starts=0).craft(trained, digits)
    part = digits.test.subset((digits.test.labels != 3) & (digits.test.labels != 7))
    found = by_class(trained, part, uap)
    assert [one.name for one in found.classes] == [name for name in digits.classes if name not in ("3", "7")]
    assert found.classes[0].uer.candidates == 8
    images = torch.rand(20, 3, 8, 8, generator=generator(0, "maps"))
    maps = gb.data.as_dataset((images, (images[:, 0] > 0.5).long()))
    net = nn.Conv2d(3, 2, 1)
    made = StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(net, maps)
    with pytest.raises(UserError, match="rates of each class"):
        by_class(net, maps, made)
