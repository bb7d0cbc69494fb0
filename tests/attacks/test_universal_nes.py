"""Universal NES on models whose strongest pattern is known, by scores or by answers alone, and its count of queries."""

import pytest
import torch

import gambeson as gb
from gambeson.attacks import StochasticPGD, UniversalNES, control
from gambeson.evaluation import universal_evasion
from gambeson.models.black_box.local import FunctionModel
from gambeson.threat import Ball
from tests.conftest import binary, inner_images
from tests.gated import Gate


@pytest.fixture(scope="module")
def first():
    """A linear model, and images that are but for one labelled as its first class, so that one pattern is the best."""
    model, w = binary((1, 5, 6))
    x = inner_images(80, (1, 5, 6))
    y = (torch.arange(80) % 20 == 0).long()
    split = {part: gb.data.Split(part, x[rows], y[rows], ("a", "b")) for part, rows in SLICES.items()}
    return model, w, gb.data.Dataset("linear", **split, classes=("a", "b"))


SLICES = {"train": slice(0, 40), "validation": slice(40, 60), "test": slice(60, 80)}


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_signs_of_a_linear_model_are_found(first, norm):
    model, w, data = first
    uap = UniversalNES(eps=0.1, norm=norm, queries=20_000, batch_size=100).craft(model, data)
    best = Ball(eps=0.1, norm=norm).fill(w.sign().view(1, 1, 5, 6))
    gain = float(model(data.test.images + best).diff(dim=1).mean() - model(data.test.images).diff(dim=1).mean())
    best = best if gain > 0 else -best
    agree = uap.delta.sign() == best.sign()
    assert float((w.abs().view(1, 1, 5, 6) * agree).sum() / w.abs().sum()) > 0.97
    assert torch.allclose(uap.delta.abs(), best.abs())


@pytest.fixture(scope="module")
def gate(trained, digits):
    return Gate(trained, digits, 0.15)


def test_a_pattern_behind_a_gate_is_found_where_gradients_do_not_lead(gate, digits):
    uap = UniversalNES(eps=0.15, queries=30_000).craft(gate, digits)
    crafted = StochasticPGD(eps=0.15, steps=100, probe_starts=0).craft(gate, digits)
    assert universal_evasion(gate, digits, uap).low > 0.9
    assert universal_evasion(gate, digits, crafted).high < 0.8
    assert float((uap.delta.sign() == gate.pattern).float().mean()) > 0.8


def test_answers_alone_lead_there_too(gate, digits):
    def answer(images):
        return torch.eye(10)[gate(images).argmax(1)]

    uap = UniversalNES(eps=0.15, queries=30_000).craft(FunctionModel(answer), digits)
    assert universal_evasion(gate, digits, uap).low > 0.9


def test_it_does_more_harm_than_noise_and_repeats(trained, digits):
    attack = UniversalNES(eps=0.15, queries=20_000)
    uap = attack.craft(trained, digits)
    assert torch.equal(uap.delta, attack.craft(trained, digits).delta)
    assert not torch.equal(uap.delta, attack.craft(trained, digits, seed=1).delta)
    noise = control("random-sign", attack.ball, digits.test.shape, draws=10)
    images, labels = digits.test.take(slice(None))
    worst = max(float((trained((images + one).clamp(0, 1)).argmax(1) != labels).float().mean()) for one in noise)
    assert universal_evasion(trained, digits, uap).value > worst + 0.1


@pytest.mark.parametrize("queries", [1, 37, 900, 5000])
def test_no_more_images_are_asked_about_than_it_says(trained, digits, queries):
    attack = UniversalNES(eps=0.15, queries=queries)
    spent = attack.craft(trained, digits).about.forwards
    assert spent <= attack.asked(digits) == queries + len(digits.validation)
    assert spent >= attack.asked(digits) - attack.batch_size


def test_a_target_is_reached(trained, digits):
    uap = UniversalNES(eps=0.3, queries=30_000, target=8).craft(trained, digits)
    images, _ = digits.test.take(slice(None))
    answers = trained((images + uap.delta).clamp(0, 1)).argmax(1)
    clean = trained(images).argmax(1)
    assert float((answers == 8).float().mean()) > float((clean == 8).float().mean()) + 0.3
