"""``score_uap``: every number is that of the function of its own, from one clean pass and one perturbed."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import StochasticPGD, UniversalPatch, UniversalPerturbation
from gambeson.data import Dataset, LazySplit, Split
from gambeson.evaluation import (
    confusion,
    fooling_rate,
    rates_beside,
    score_uap,
    target_success,
    under_edits,
    universal_evasion,
)


class Counting(nn.Module):
    """Counts the images that a model is asked about."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        self.asked += len(x)
        return self.model(x)


class Noisy(nn.Module):
    """A model whose answers are drawn."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.2 * torch.randn_like(x))


class Pixelwise(nn.Module):
    """Class 1 where a pixel is bright."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


def maps(name, seed):
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = (x[:, 0] > 0.55).long()
    labels[:, 0, 0] = 255
    return Split(name, x, labels, ("dark", "bright"), ignore_index=255)


@pytest.fixture(scope="module")
def uap(trained, digits):
    return StochasticPGD(eps=0.2, restarts=1, steps=10).craft(trained, digits)


def test_numbers_are_those_of_the_functions_of_their_own(trained, digits, uap):
    found = score_uap(trained, digits, uap, edits=["blur:0.5"], seed=3)
    assert found.uer == universal_evasion(trained, digits, uap, seed=3)
    assert found.fooling == fooling_rate(trained, digits, uap, seed=3)
    assert found.clean == gb.evaluation.accuracy(trained, digits, seed=3).complement
    assert found.controls == rates_beside(trained, digits, uap, seed=3)
    assert found.edits.rates == under_edits(trained, digits, uap, ["blur:0.5"], seed=3).rates
    assert found.uer.value > max(one.worst.value for one in found.controls)
    assert (found.images, found.left_out) == (len(digits.test), 0)
    assert found.rival is found.target is found.mean_iou is found.placements is None


def test_two_passes_and_one_for_each_pattern_of_a_control(trained, digits, uap):
    model = Counting(trained)
    score_uap(model, digits, uap)
    controls = model.asked - 2 * len(digits.test)
    model.asked = 0
    rates_beside(model, digits, uap)
    assert abs(controls - model.asked) <= 64  # what inspects the model, not 450 images more


def test_a_random_model_is_scored_by_the_same_votes(trained, digits, uap):
    model = Noisy(trained)
    found = score_uap(model, digits, uap, seed=5)
    assert found.uer == universal_evasion(model, digits, uap, seed=5)
    assert found.fooling == fooling_rate(model, digits, uap, seed=5)
    assert found.clean.value > gb.evaluation.accuracy(trained, digits).complement.value


def test_a_piece_of_an_image_is_cut_from_all_images_as_where_nothing_is_held_out(trained, digits, uap):
    seen = torch.cat([uap.image_hashes, digits.test.subset(torch.arange(9)).image_hashes])
    told = UniversalPerturbation(uap.delta, uap.about, seen)
    found = score_uap(trained, digits, told, edits=None)
    assert found.left_out > 0
    assert found.controls == rates_beside(trained, digits, told)


def test_label_maps_on_disk_have_the_mean_iou_of_confusion():
    data = Dataset("maps", maps("train", 1), maps("validation", 2), maps("test", 3), ("dark", "bright"))
    attack = StochasticPGD(eps=0.2, restarts=1, steps=10)
    crafted, test = attack.craft(Pixelwise(), data), data.test
    lazy = LazySplit(
        "test", lambda k: (test.images[k], test.labels[k]), len(test), ("dark", "bright"), ignore_index=255
    )
    found = score_uap(Pixelwise(), lazy, crafted)
    clean, perturbed = confusion(Pixelwise(), test), confusion(Pixelwise(), test, crafted)
    assert (found.mean_iou.clean, found.mean_iou.perturbed) == (clean.mean_iou, perturbed.mean_iou)
    assert found.mean_iou.lost == clean.drop(perturbed)
    assert found.mean_iou.lost.value > 0.05
    for ours, theirs in ((found.clean, clean.accuracy.complement), (found.uer, perturbed.accuracy.complement)):
        assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high))
    assert found.fooling == fooling_rate(Pixelwise(), test, crafted)


def test_a_target_has_its_own_controls_and_leaves_its_class_out(trained, digits):
    patch = UniversalPatch(area=0.2, probe_starts=0, steps=10, target="class:#3").craft(trained, digits)
    found = score_uap(trained, digits, patch)
    assert found.target == target_success(trained, digits, patch, controls=gb.attacks.PATCH_CONTROLS)
    assert found.left_out == int((digits.test.labels == 3).sum()) > 0
    assert (found.controls, found.rival) == ([], None)


def test_a_perturbation_that_does_nothing_names_its_rival(trained, digits, uap):
    weak = gb.attacks.UniversalPerturbation(-uap.delta * 0.05, uap.about, uap.image_hashes)
    found = score_uap(trained, digits, weak)
    assert found.rival.worst.value >= found.uer.value
    assert score_uap(trained, digits, uap).rival is None


def test_whole_images_have_no_place(trained, digits, uap):
    with pytest.raises(UserError, match="leave placements out"):
        score_uap(trained, digits, uap, placements=True)
