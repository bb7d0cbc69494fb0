"""Models that store every split, hide a pattern behind a threshold, or answer with another network than they score."""

import math
import os
import sys
from math import radians

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gambeson.auditing.diagnostics import get
from gambeson.auditing.diagnostics.test_leakage import _blended
from gambeson.auditing.stages import per_image, universal
from gambeson.data import Split
from gambeson.testbed.obfuscations.logits import ThinLayer
from gambeson.testbed.recipes import networks
from gambeson.threat.edits import moved
from tests.auditing.evidence import held
from tests.conftest import full
from tests.gated import Gate

EPS = 0.15


class Remembered(nn.Module):
    """A network with a smooth bonus for the label of the nearest of some images, within a distance of it."""

    def __init__(self, net, *splits):
        super().__init__()
        self.net, parts = net, [split.take(slice(None)) for split in splits]
        self.images = torch.cat([x for x, _ in parts]).flatten(1)
        self.labels = F.one_hot(torch.cat([y for _, y in parts]), 10).float()

    def forward(self, x):
        apart = torch.cdist(x.flatten(1), self.images).square()
        weight = torch.sigmoid((1.7 - apart) / 0.1) * torch.softmax(-apart / 0.1, 1)
        return self.net(x) + 30 * (weight @ self.labels)


def beside(model, data):
    with held(model, data, (EPS,)) as context:
        return get("rotated and blended images stand too").check(context)


def test_a_net_that_stores_all_splits_falls_where_images_are_rotated_and_blended(trained, digits):
    check = beside(Remembered(trained, digits.train, digits.validation, digits.test), digits)
    assert check.passed is False
    assert check.numbers["as they are, beside rotated"] > 0.95
    assert check.numbers["rotated"] < 0.1
    assert check.numbers["blended"] < 0.65


def test_copies_that_are_rotated_by_one_angle_do_not_cover_what_is_drawn(trained, digits):
    images, labels = digits.test.take(slice(None))
    turned = [moved(images, torch.full((len(images),), angle)) for angle in (-radians(10), radians(10))]
    copies = Split("copies", torch.cat(turned), labels.repeat(2), digits.classes)
    check = beside(Remembered(trained, digits.test, copies), digits)
    assert check.numbers["as they are, beside rotated"] > check.numbers["rotated"] + 0.4


def test_a_model_that_is_never_right_has_nothing_to_be_moved(trained, digits):
    check = beside(nn.Sequential(trained, Next()), digits)
    assert check.passed is None
    assert check.detail == "no image of the sample is right as it is and rotated"


class Next(nn.Module):
    """Each class as the next one."""

    def forward(self, z):
        return (10.0 * F.one_hot(z.argmax(1), 10) + 0 * z).roll(1, 1)


class Neighbours(nn.Module):
    """The log-likelihood of each class by a Gaussian kernel over the training images."""

    def __init__(self, data):
        super().__init__()
        images, labels = data.train.take(slice(None))
        self.images, self.labels = images.flatten(1), F.one_hot(labels, 10).float()

    def forward(self, x):
        weight = torch.softmax(-torch.cdist(x.flatten(1), self.images).square() / 0.25, 1)
        return (weight @ self.labels).clamp(min=1e-9).log()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_classifier_that_stores_training_images_alone_is_not_accused(digits, seed):
    with held(Neighbours(digits), digits, (EPS,)) as context:
        context.seed = seed
        check = get("rotated and blended images stand too").check(context)
    assert check.passed is True
    assert check.numbers["as they are, beside rotated"] > check.numbers["rotated"] + 0.3  # which alone would accuse it


def test_blends_are_means_of_two_images_of_a_class():
    images = torch.rand(9, 1, 4, 4)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 1, 0])
    blended = _blended(images, labels, torch.Generator().manual_seed(0))
    for k in range(9):
        same = [j for j in range(9) if labels[j] == labels[k] and j != k] or [k]
        assert any(torch.allclose(blended[k], (images[k] + images[j]) / 2) for j in same)


@pytest.mark.parametrize("name", [full("pgd-adversarial"), "trades", full("jacobian"), "Lipschitz", "linear"])
def test_honest_nets_fall_less(name, digits):
    check = beside(networks("digits")(name), digits)
    assert check.passed is True
    assert check.numbers["as they are, beside rotated"] > check.numbers["rotated"]


def queried(model, data, queries=30_000):
    settings = {"universal_steps": 60, "universal_restarts": 1, "universal_probe_starts": 0, "surrogate": "none"}
    with held(model, data, (0.1, EPS, 0.2), universal_queries=queries, **settings) as context:
        universal.craft_by_queries(context, None)
        context.universal += [universal.craft_point(context, eps, None) for eps in context.suite.eps]
        context.per_image = per_image.measure(context)
        return get("universal white box beats queries").check(context), context


def test_a_pattern_behind_a_threshold_is_found_by_queries_and_counts(trained, digits):
    check, context = queried(Gate(trained, digits, EPS), digits)
    assert check.passed is False
    assert context.middle.attack == "universal-nes"
    assert context.middle.uer.value > context.middle.crafted.value + 0.2
    assert context.middle.uer.value == pytest.approx(1 - check.numbers["other"])
    assert context.universal[-1].uer.value > 0.9  # the same signs, at every eps
    pgd, targeted = context.per_image
    assert targeted.rounds[0].attack == "universal"
    assert targeted.accuracy.value <= 1 - context.middle.uer.value < pgd.accuracy.value  # one for all is one for each


def test_an_honest_net_passes_and_without_queries_nothing_is_said(trained, digits):
    check, context = queried(trained, digits)
    assert check.passed is True
    assert context.middle.crafted is None
    check, context = queried(trained, digits, 0)
    assert check.passed is None
    assert context.queried is None


def test_answers_that_scores_do_not_lead_to_are_found_by_rays():
    nets = networks("digits")
    name = "white box beats queries"
    with held(ThinLayer(nets(), nets("standard 1")), nets.data, (EPS,), queries=200) as context:
        check = get(name).check(context)
    assert check.passed is False
    assert "RayS breaks" in check.detail
    with held(nets(), nets.data, (EPS,), queries=200) as context:
        assert get(name).check(context).passed is True


class Waves(nn.Module):
    """A sinusoid of the pixels on each logit, which differences resolve and steps do not."""

    def __init__(self, net, data, size=0.2, frequency=60.0):
        super().__init__()
        images, _ = data.validation.take(slice(None))
        with torch.no_grad():
            top = net(images).topk(2, 1).values
        ways = torch.randn(math.prod(data.train.shape), data.num_classes, generator=torch.Generator().manual_seed(0))
        self.net, self.ways = net, frequency * ways / ways.norm(dim=0)
        self.size = size * float((top[:, 0] - top[:, 1]).median())

    def forward(self, x):
        return self.net(x) + self.size * torch.sin(x.flatten(1) @ self.ways)


class Modest(nn.Module):
    """A network that is the less sure the surer it is, on images as smooth as those of the data."""

    def __init__(self, net, data, share=0.3):
        super().__init__()
        images, _ = data.validation.take(slice(None))
        with torch.no_grad():
            self.net, self.most = net, share * float(self.margin(net(images)).median())
        self.rough = 1.15 * float(self.roughness(images).median())

    @staticmethod
    def margin(z):
        top = z.topk(2, 1).values
        return top[:, :1] - top[:, 1:]

    @staticmethod
    def roughness(x):
        return (x - F.avg_pool2d(x, 3, 1, 1)).abs().flatten(1).mean(1, keepdim=True)

    def forward(self, x):
        z = self.net(x)
        smooth = torch.sigmoid((self.rough - self.roughness(x)) / (0.05 * self.rough))
        return z / (1 + smooth * (self.margin(z) / self.most) ** 2)


def other_gradients(model, data):
    with held(model, data, (EPS,)) as context:
        return get("other gradients no stronger").check(context)


@pytest.mark.parametrize("kind", [Waves, Modest])
def test_a_gradient_that_leads_nowhere_is_found_by_another(kind, digits):
    check = other_gradients(kind(networks("digits")("pgd-adversarial"), digits), digits)
    assert check.passed is False
    assert check.numbers["broken by other gradients"] >= 10


@pytest.mark.parametrize("name", [full("pgd-adversarial"), "trades", full("jacobian"), "Lipschitz", "linear"])
def test_honest_gradients_lead_where_others_do(name, digits):
    check = other_gradients(networks("digits")(name), digits)
    assert check.passed is True
    assert check.numbers["broken by other gradients"] <= 3


class Device(nn.Module):
    """Another network answers where an audit is on the stack."""

    def __init__(self, shown, used):
        super().__init__()
        self.shown, self.used, self.seen = shown, used, set()

    def forward(self, x):
        frame = sys._getframe()
        while frame is not None:
            if f"{os.sep}gambeson{os.sep}" in frame.f_code.co_filename:
                self.seen.add("audit")
                return self.shown(x)
            frame = frame.f_back
        self.seen.add("nobody")
        return self.used(x)


def test_a_model_that_looks_who_asks_is_found(trained, digits):
    model = Device(networks("digits")("trades"), trained)
    with held(model, digits, (EPS,)) as context:
        context.per_image = per_image.measure(context)
        check = get("alike in every batch").check(context)
    assert model.seen == {"audit", "nobody"}
    assert check.passed is False
    assert "in a thread of its own" in check.detail
