"""The scale of the logits changes no prediction, and must not change what an audit finds."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.auditing import Suite, scale
from gambeson.victim import Victim, predict

SUITE = Suite(
    eps=(0.15,), universal_steps=30, universal_screened=0, pgd_steps=10, pgd_restarts=1, row_images=0, queries=0,
    slope_backwards=0, surrogate="none", eps_uni_runs=0, sample=60, noise_sizes=(1.0,),
)  # fmt: skip


class Times(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.model(x) * self.factor


def margin(victim, ask, images):
    first, second = ask(images).topk(2, dim=1).values.unbind(1)
    return float((first - second).median())


@pytest.mark.parametrize(("factor", "becomes"), [(40.0, 12.0), (0.01, 3.0), (1.0, None)])
def test_an_unusual_margin_is_brought_to_the_nearer_end(factor, becomes, trained, digits):
    images, _ = digits.validation.take(slice(0, 200))
    with Victim(Times(trained, factor)) as victim:
        own = margin(victim, victim.exact, images)
        assert becomes or scale.USUAL[0] < own < scale.USUAL[1]
        victim.temperature = scale.temperature(victim, digits.validation, 0)
        assert margin(victim, victim, images) == pytest.approx(becomes or own, rel=1e-4)
        assert margin(victim, victim.exact, images) == own
        before = predict(victim, digits.test)
    with Victim(trained) as plain:
        assert torch.equal(predict(plain, digits.test), before)


@pytest.mark.parametrize(("answer", "classes"), [(0.0, 10), (float("nan"), 10), (7.0, 1)])
def test_logits_without_a_scale_are_left_alone(answer, classes, digits):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full((len(x), classes), answer)

    with Victim(Constant()) as victim:
        assert scale.temperature(victim, digits.validation, 0) == 1


@pytest.mark.parametrize("factor", [0.01, 1000.0])
def test_an_audit_finds_no_less_whatever_the_scale(factor, trained, digits):
    plain, other = (gb.audit(model, digits, SUITE).results for model in (trained, Times(trained, factor)))
    assert other.temperature != 1 == plain.temperature
    assert other.middle.uer.value > plain.middle.uer.value - 0.05
    assert other.per_image[0].accuracy.value < plain.per_image[0].accuracy.value + 0.08
    assert other.middle.uer.value > plain.clean.complement.value + 0.1
    assert other.verdict.trusted, other.verdict.reasons
