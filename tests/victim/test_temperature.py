"""The scale of the logits changes no prediction, and must not change what an audit finds."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import SGA, StochasticPGD
from gambeson.auditing import Suite
from gambeson.victim import Victim, predict, temperature
from tests.conftest import full

SUITE = Suite(
    eps=(0.15,), universal_steps=30, universal_probe_starts=0, pgd_steps=10, pgd_restarts=1, suite_images=0, queries=0,
    jacobian_backwards=0,
    universal_queries=300, surrogate="none", eps_uni_runs=0, eps_adv=False, sample=60, noise_sizes=(1.0,),
    edits=(), rescoring=False,
)  # fmt: skip


class Times(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.model(x) * self.factor


@pytest.mark.parametrize(("factor", "left"), [(40.0, False), (0.01, False), (1.0, True)])
def test_an_unusual_scale_is_brought_to_calibration(factor, left, trained, digits):
    images, _ = digits.validation.take(slice(0, 200))
    with Victim(trained) as plain:
        own = temperature.calibrating(plain, digits.validation, 0)
        before = predict(plain, digits.test)
        logits = plain.forward_original(images)
    assert temperature.USUAL[0] < own < temperature.USUAL[1]
    with Victim(Times(trained, factor)) as victim:
        assert temperature.calibrating(victim, digits.validation, 0) == pytest.approx(factor * own, rel=1e-4)
        victim.temperature = temperature.temperature(victim, digits.validation, 0)
        assert torch.allclose(victim(images), logits if left else logits / own, rtol=1e-3, atol=1e-4)
        assert torch.equal(victim.forward_original(images), logits * factor)
        assert torch.equal(predict(victim, digits.test), before)


def test_the_calibrating_temperature_is_known_where_answers_are_drawn_from_it():
    """Labels drawn from the softmax of z / 5; and a model without an error, which is not sharpened without end."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(200, 1, 20, 20, generator=draw)
    z = 15 * torch.randn(200, 4, 20, 20, generator=draw)

    class Drawn(nn.Module):
        def forward(self, x):
            where = [int((images == image).flatten(1).all(1).nonzero()) for image in x]
            return z[where]

    shares = (z / 5).softmax(1).movedim(1, -1).flatten(0, -2)
    labels = torch.multinomial(shares, 1, generator=draw).view(200, 20, 20)
    split = gb.data.Split("drawn", images, labels, tuple("abcd"))
    with Victim(Drawn()) as victim:
        assert temperature.calibrating(victim, split, 0) == pytest.approx(5, rel=0.05)
        perfect = gb.data.Split("right", images, z.argmax(1), tuple("abcd"))
        assert 0 < temperature.calibrating(victim, perfect, 0) < 5


class Masked(nn.Module):
    """Two classes more than it was trained on, which it never answers."""

    def __init__(self, model, mask):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x):
        z = self.model(x)
        return torch.cat([z.new_full((len(z), 1), self.mask), z, z.new_full((len(z), 1), self.mask)], 1)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30])
def test_a_masked_class_does_not_set_the_scale(mask, trained, digits):
    split = digits.validation
    moved = gb.data.Split("moved", split.images, split.labels + 1, ("before", *split.classes, "after"))
    with Victim(trained) as plain, Victim(Times(Masked(trained, mask), 40.0)) as masked:
        own = temperature.calibrating(plain, split, 0)
        assert temperature.calibrating(masked, moved, 0) == pytest.approx(40 * own, rel=1e-3)


@pytest.mark.parametrize(("answer", "classes"), [(0.0, 10), (float("nan"), 10), (7.0, 1)])
def test_logits_without_a_scale_are_left_alone(answer, classes, digits):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full((len(x), classes), answer)

    with Victim(Constant()) as victim:
        assert temperature.temperature(victim, digits.validation, 0) == 1


@pytest.mark.full
@pytest.mark.parametrize("factor", [0.01, 1000.0])
def test_an_audit_finds_no_less_whatever_the_scale(factor, trained, digits):
    plain, other = (gb.audit(model, digits, SUITE).results for model in (trained, Times(trained, factor)))
    assert other.temperature != 1 == plain.temperature
    assert other.middle.uer.value > plain.middle.uer.value - 0.05
    assert other.per_image[0].accuracy.value < plain.per_image[0].accuracy.value + 0.08
    assert other.middle.uer.value > plain.clean.complement.value + 0.1
    assert other.verdict.trusted, other.verdict.reasons


UNIVERSAL = [StochasticPGD(eps=0.2, steps=60, probe_starts=0), full(SGA(eps=0.2, steps=20, batch_size=100))]


@pytest.mark.parametrize("attack", UNIVERSAL)
@pytest.mark.parametrize("factor", [0.01, pytest.param(300.0, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore::gambeson.attacks.solver.GradientWarning")
def test_a_universal_attack_finds_no_less_whatever_the_scale(factor, attack, trained, digits):
    plain, other = (attack.craft(model, digits) for model in (trained, Times(trained, factor)))
    papers = attack.model_copy(update={"temperature": 1.0}).craft(Times(trained, factor), digits)
    assert plain.about.temperature == papers.about.temperature == (1,)
    assert other.about.temperature == (pytest.approx(factor, rel=0.5),)
    assert plain.about.forwards == other.about.forwards == papers.about.forwards + 200
    found, scaled, without = (gb.evaluation.universal_evasion(trained, digits, u).value for u in (plain, other, papers))
    assert scaled > found - 0.05
    assert scaled > without + (0.1 if factor < 1 else 0.02)
    assert torch.equal(attack.model_copy(update={"temperature": 1.0}).craft(trained, digits).delta, plain.delta)


def test_each_model_has_a_temperature_of_its_own_but_an_entered_victim_keeps_its(trained, digits):
    attack = StochasticPGD(eps=0.2, steps=2, probe_starts=0)
    both = attack.craft([trained, Times(trained, 0.01)], digits)
    assert both.about.temperature == (1, pytest.approx(0.01, rel=0.5))
    with Victim(Times(trained, 0.01), fast=True) as victim:  # entered or not is the same
        uap = attack.craft(victim, digits)
        assert victim.temperature is None
    again = attack.craft(Times(trained, 0.01), digits)
    assert torch.equal(uap.delta, again.delta)
    assert uap.about.temperature == again.about.temperature
    with Victim(Times(trained, 0.01)) as victim:
        victim.temperature = 0.5
        assert attack.craft([victim, trained], digits).about.temperature == (0.5, 1)
        assert attack.model_copy(update={"temperature": 2.0}).craft(victim, digits).about.temperature == (2,)
        assert victim.temperature == 0.5
    with pytest.raises(UserError, match="temperature"):
        StochasticPGD(eps=0.2, temperature=0)


def test_eps_uni_is_that_of_usual_logits(trained, digits):
    attack = StochasticPGD(eps=0.2, steps=20, probe_starts=0, truncate=0.5)
    one, other = (
        gb.evaluation.eps_uni(model, digits, attack, tolerance=0.5) for model in (trained, Times(trained, 0.01))
    )
    assert other.value == pytest.approx(one.value, rel=0.25)
