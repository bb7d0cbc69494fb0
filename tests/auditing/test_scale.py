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


def test_the_median_margin_is_brought_to_three(trained, digits):
    with Victim(Times(trained, 40.0)) as victim:
        victim.temperature = scale.temperature(victim, digits.validation, 0)
        images, _ = digits.validation.take(slice(0, 200))
        first, second = victim(images).topk(2, dim=1).values.unbind(1)
        assert float((first - second).median()) == pytest.approx(scale.MARGIN, rel=1e-4)
        torch.testing.assert_close(victim.exact(images), trained(images) * 40)
        before = predict(victim, digits.test)
    with Victim(trained) as plain:
        assert torch.equal(predict(plain, digits.test), before)


@pytest.mark.parametrize("answer", [0.0, float("nan")])
def test_logits_without_a_scale_are_left_alone(answer, digits):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), answer)

    with Victim(Constant()) as victim:
        assert scale.temperature(victim, digits.validation, 0) == 1


@pytest.mark.parametrize("factor", [0.01, 1000.0])
def test_an_audit_finds_the_same_whatever_the_scale(factor, trained, digits):
    plain, other = (gb.audit(model, digits, SUITE).results for model in (trained, Times(trained, factor)))
    assert other.temperature == pytest.approx(factor * plain.temperature, rel=1e-3)
    assert other.middle.uer.value == pytest.approx(plain.middle.uer.value, abs=0.02)
    assert other.per_image[0].accuracy.value == pytest.approx(plain.per_image[0].accuracy.value, abs=0.02)
    assert other.middle.uer.value > plain.clean.complement.value + 0.1
    assert other.verdict.trusted, other.verdict.reasons
