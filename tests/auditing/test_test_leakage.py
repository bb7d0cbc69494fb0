"""What a model withstands on the images it is scored on, it must withstand on others as well."""

import pytest
import torch
from scipy.stats import beta
from torch import nn

import gambeson as gb
from gambeson.auditing import DIAGNOSTICS, Suite
from gambeson.auditing.outcome import LEVEL, PairedDifference
from gambeson.auditing.stages.universal import craft_point
from gambeson.data import Dataset, Split
from gambeson.tasks import Counts
from gambeson.testbed.obfuscations.context import MemoryWithin, SoftMemory
from gambeson.victim import Victim
from tests.auditing.evidence import evidence_of

(UNSEEN,) = (one for one in DIAGNOSTICS if one.name == "no test-set leakage")
SUITE = Suite(
    eps=(0.1, 0.2), sample=200, universal_steps=40, universal_probe_starts=0, universal_restarts=1, pgd_steps=10
)

ORDER = Suite(eps=(0.15,), universal_steps=5, universal_probe_starts=0, universal_restarts=1)


def check(model, data, suite=SUITE, *, black_box=False):
    with Victim(model, fast=False) as victim:
        evidence = evidence_of(victim, data, suite)
        evidence.universal += [craft_point(evidence, eps, None) for eps in suite.eps]
        evidence.subject = evidence.subject.model_copy(update={"black_box": black_box})
        before = victim.forwards
        return UNSEEN.check(evidence), victim.forwards - before


@pytest.mark.parametrize("kind", [MemoryWithin, SoftMemory])
def test_a_net_that_knows_the_test_images_is_found(kind, trained, digits):
    found, _ = check(kind(trained, *digits.test.take(slice(None))), digits)
    assert found.passed is False
    assert found.numbers["test"] > found.numbers["validation"] + 0.1
    assert "of the test images stand and" in found.detail


class Nudged(MemoryWithin):
    """The network with a little added to the logit of a test image of the audit that lies near."""

    least, most = 0.0, 0.35

    def forward(self, x):
        gap, which = torch.cdist(x.detach().flatten(1), self.images, p=torch.inf).min(1)
        z = self.net(x)
        return (
            z
            + 1.2
            * nn.functional.one_hot(self.labels[which], z.shape[1])
            * ((gap >= self.least) & (gap < self.most))[:, None]
        )


@pytest.mark.parametrize(("least", "most", "how"), [(0.01, 0.35, "after PGD of 5 steps"), (0, 0.01, "clean")])
def test_a_little_knowledge_of_the_test_images_is_found_by_the_order_of_margins(trained, digits, least, most, how):
    model = Nudged(trained, *digits.test.take(slice(None)))
    model.least, model.most = least, most
    found, _ = check(model, digits, ORDER)
    assert found.passed is False
    assert found.numbers["gap"] < 0.2  # which alone would not be clear
    assert 0.57 < found.numbers["order"] < 0.7
    assert f"; {how} the test image has" in found.detail


@pytest.mark.full
def test_a_net_that_was_trained_on_attacked_test_images_is_found(digits):
    found, _ = check(gb.testbed.networks("digits")("pgd-adversarial on test"), digits, ORDER)
    assert found.passed is False
    assert found.numbers["gap"] < 0.2  # which alone would not be clear
    assert 0.57 < found.numbers["order"] < 0.66
    assert "the test image has the larger margin in 6" in found.detail


def test_the_order_of_margins_by_hand(trained, digits):
    """Every pair is counted, and a copy of the test split as validation gives one half exactly."""
    data = Dataset(digits.name, digits.train, digits.test, digits.test, digits.classes)
    found, _ = check(trained, data, ORDER)
    assert found.numbers["order"] == pytest.approx(0.5)
    assert "(60.7 % would be found" in found.detail  # 0.53 + (3.14 + 0.84) * (2 / 449 / 12) ** 0.5


def test_a_net_that_knows_the_validation_images_is_not_accused(trained, digits):
    found, _ = check(MemoryWithin(trained, *digits.validation.take(slice(None))), digits)
    assert found.passed
    assert found.numbers["gap"] < 0


class Unreached(MemoryWithin):
    """The network, but validation images stand wherever an image was moved along the network's own direction."""

    def __init__(self, net, images, labels, direction):
        super().__init__(net, images, labels)
        self.direction = direction.sign().flatten()

    def forward(self, x):
        flat = x.detach().flatten(1)
        gap, which = torch.cdist(flat, self.images, p=torch.inf).min(1)
        along = (flat - self.images[which]).sign() @ self.direction / flat.shape[1]
        stands = ((gap < 0.32) & (along > 0.6))[:, None]
        return self.net(x) + 40 * stands * nn.functional.one_hot(self.labels[which], 10)


def test_validation_images_that_stand_do_not_choose_what_is_reported(digits):
    net = gb.testbed.networks("digits")("standard")
    suite = ORDER.model_copy(update={"universal_steps": 100, "universal_batch": 32, "universal_probe_starts": 3})
    with Victim(net, fast=False) as victim:
        honest = craft_point(evidence_of(victim, digits, suite), 0.15, None)
        direction = suite.universal(0.15).craft(victim, digits, seed=0).delta
    model = Unreached(net, *digits.validation.take(slice(None)), direction)
    with Victim(model, fast=False) as victim:
        evidence = evidence_of(victim, digits, suite)
        point = craft_point(evidence, 0.15, None)
    assert honest.uer.value > max(one.worst.value for one in honest.controls) + 0.05
    assert point.uer.value > honest.uer.value - 0.05
    assert point.uer.candidates == 2
    assert point.crafted is None
    assert evidence.uaps[0.15].about.chosen_on == digits.test.name
    wrong = evidence.counts[0.15].wrong.sum() / len(digits.test)
    assert float(wrong) == pytest.approx(point.uer.value)


def test_an_honest_net_passes(trained, digits):
    found, _ = check(trained, digits)
    assert found.passed
    assert found.numbers["test"] < 0.9  # under an attack that does something


def test_a_black_box_is_asked_about_the_sample_alone(trained, digits):
    found, asked = check(trained, digits, black_box=True)
    assert found.passed
    assert asked == 2 * SUITE.sample


class Pixelwise(nn.Module):
    """Two logits a pixel, of which the second is the brightness, for label maps."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


def test_label_maps_are_compared_by_pixels():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(3, 60, 1, 8, 8, generator=draw)
    splits = [Split("maps", part, (part[:, 0] > 0.5).long()) for part in images]
    found, _ = check(Pixelwise(), Dataset("maps", *splits, splits[0].classes))
    assert found.passed
    assert abs(found.numbers["gap"]) < 0.02
    assert 0.5 < found.numbers["test"] < 0.9


def outcome(right, of):
    return Counts((torch.arange(of) < right).long(), torch.ones(of, dtype=torch.long))


def test_a_difference_of_two_samples_by_hand():
    gain = PairedDifference.across(outcome(90, 100), outcome(60, 100))
    exact = [(beta.ppf(LEVEL, k, 101 - k), beta.ppf(1 - LEVEL, k + 1, 100 - k)) for k in (90, 60)]
    (a, b), (c, d) = exact  # Clopper and Pearson's ends
    assert gain.value == pytest.approx(0.3)
    assert gain.low == pytest.approx(0.3 - ((0.9 - a) ** 2 + (d - 0.6) ** 2) ** 0.5)
    assert gain.high == pytest.approx(0.3 + ((b - 0.9) ** 2 + (0.6 - c) ** 2) ** 0.5)
    same = PairedDifference.across(outcome(50, 50), outcome(5, 5))
    assert same.value == 0
    assert same.low < 0 < same.high
