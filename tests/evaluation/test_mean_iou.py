"""Mean IoU of models on label maps, clean and under a universal perturbation."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import StochasticPGD
from gambeson.base import UserError
from gambeson.data import Dataset, Split
from gambeson.tasks import Rate


class Pixelwise(nn.Module):
    """Class 1 where a pixel is bright."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


def split(name, count=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=draw)
    labels = (images[:, 0] > 0.5).long()
    labels[torch.rand(labels.shape, generator=draw) < 0.1 + 0.1 * torch.rand(count, 1, 1, generator=draw)] = 0
    labels[:, 0, 0] = 255
    return Split(name, images, labels, ("dark", "bright"), ignore_index=255)


DATA = Dataset("maps", split("train", seed=1), split("validation", seed=2), split("test", seed=3), ("dark", "bright"))


def test_mean_iou_and_accuracy_of_a_model_equal_their_definition():
    truth, predicted = DATA.test.labels, (DATA.test.images[:, 0] > 0.5).long()
    valid = truth != 255
    iou = [
        float(((predicted == k) & (truth == k)).sum() / (((predicted == k) | (truth == k)) & valid).sum())
        for k in (0, 1)
    ]
    found = gb.evaluation.confusion(Pixelwise(), DATA)
    assert {name: rate.value for name, rate in found.iou.items()} == pytest.approx({"dark": iou[0], "bright": iou[1]})
    rate = gb.evaluation.mean_iou(Pixelwise(), DATA)
    assert rate == found.mean_iou
    assert (rate.value, rate.n) == (pytest.approx(sum(iou) / 2), 60)
    assert found.accuracy == gb.evaluation.accuracy(Pixelwise(), DATA)
    # 63 pixels of 60 images: narrower than 60 answers would be, wider than the 3780 pixels if they were independent.
    assert rate.high - rate.low < 0.3 * (Rate.of(50, 60).high - Rate.of(50, 60).low)


def test_a_perturbation_lowers_the_mean_iou_and_nothing_does_not():
    found = gb.evaluation.confusion(Pixelwise(), DATA)
    uap = StochasticPGD(eps=0.2, steps=10).craft(Pixelwise(), DATA)
    moved = gb.evaluation.confusion(Pixelwise(), DATA, uap)
    assert moved.mean_iou == gb.evaluation.mean_iou(Pixelwise(), DATA.test, uap)
    assert moved.accuracy.value == pytest.approx(1 - gb.evaluation.universal_evasion(Pixelwise(), DATA, uap).value)
    drop = found.drop(moved)
    assert drop.value == pytest.approx(found.mean_iou.value - moved.mean_iou.value)
    assert drop.low > 0.05
    still = type(uap)(torch.zeros_like(uap.delta), uap.about, uap.image_hashes)
    same = gb.evaluation.confusion(Pixelwise(), DATA, still)
    assert same.mean_iou == found.mean_iou
    assert found.drop(same).value == 0
    assert gb.evaluation.fooling_rate(Pixelwise(), DATA, still).value == 0


def test_data_without_a_label_is_refused():
    nothing = Split("nothing", DATA.test.images, DATA.test.labels.clone().fill_(255), ("dark", "bright"), 255)
    with pytest.raises(UserError, match="nothing has no label that counts"):
        gb.evaluation.mean_iou(Pixelwise(), nothing)


def test_a_frame_has_the_classes_and_their_means():
    pytest.importorskip("pandas")
    found = gb.evaluation.confusion(Pixelwise(), DATA).to_frame()
    names = ["IoU of dark", "IoU of bright", "mean IoU", "mean accuracy", "pixel accuracy"]
    assert found["metric"].tolist() == names
    assert found["value"][2] == pytest.approx(found["value"][:2].mean())
