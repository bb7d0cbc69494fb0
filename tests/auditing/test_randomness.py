"""Rates of random models: the majority of many passes decides, repeatably; and their noise can be turned off."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.attacks import FGSM
from gambeson.auditing import Suite
from gambeson.auditing.derandomize import Derandomize
from gambeson.auditing.stages import randomness
from gambeson.auditing.stages.randomness import ELSEWHERE, SWITCHES
from gambeson.data import Split
from gambeson.evaluation import accuracy_under
from gambeson.evaluation.universal import control_rates
from gambeson.threat import Ball
from gambeson.victim import ABSTAIN, DEFAULT_VOTES, Victim, as_victim, predict, score, vote, votes_of
from tests.auditing.evidence import evidence_of


class Unlucky(nn.Module):
    """Answers with class 0, but with class 1 with probability ``chance``; drawn once for a batch if ``shared``."""

    def __init__(self, chance, shared=False):
        super().__init__()
        self.chance, self.shared, self.forwards = chance, shared, 0

    def forward(self, x):
        self.forwards += 1
        drawn = torch.rand(1).expand(len(x)) if self.shared else torch.rand(len(x))
        wrong = (drawn < self.chance).float() + 0 * x.flatten(1).sum(1)
        return torch.stack([1 - wrong, wrong], 1) * 3 + 1


class Scripted(nn.Module):
    """Pass k over image i answers with ``answers[k][i]``; an image is known by its first pixel."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = torch.tensor(answers), {}

    def forward(self, x):
        rows = (x[:, 0, 0, 0] * 100).round().long().tolist()
        found = []
        for row in rows:
            turn = self.asked.get(row, 0)
            self.asked[row] = turn + 1
            found.append(self.answers[turn % len(self.answers)][row])
        return F.one_hot(torch.stack(found), 4).float()


def zeros(count):
    return Split("zeros", torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.long), ("a", "b"))


def test_the_majority_of_the_passes_is_the_answer_and_none_is_none():
    answers = [[1, 2, 3, 0], [1, 2, 0, 0], [1, 0, 1, 0], [0, 0, 2, 0], [0, 2, 3, 0]]
    images = (torch.arange(4) / 100).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    model = Scripted(answers)
    with Victim(model) as victim:
        victim.votes = 5
        assert vote(victim, images).tolist() == [1, 2, ABSTAIN, 0]
        assert model.asked == {0: 3, 1: 5, 2: 5, 3: 3}  # three equal answers of five need no more
        assert victim.forwards == 16
        assert score(torch.tensor([ABSTAIN]), zeros(1)).errors == 1


def test_a_net_that_is_wrong_three_times_in_ten_is_not_broken():
    split = zeros(500)
    rates = [gb.evaluation.accuracy(Unlucky(0.3), split, seed=seed) for seed in range(3)]
    for rate in rates:
        assert rate.value == pytest.approx(0.974, abs=0.025)
        assert rate.low < rates[0].high  # another seed stays within the interval
        assert rates[0].low < rate.high
    assert gb.evaluation.accuracy(Unlucky(0.3), split, seed=1) == rates[1]
    assert gb.evaluation.accuracy(Unlucky(0.6), split).value < 0.25
    with Victim(Unlucky(0.3)) as victim, torch.random.fork_rng():
        victim.votes = 1
        assert 1 - score(predict(victim, split), split).error == pytest.approx(0.7, abs=0.07)  # a single pass


def test_draws_shared_by_a_forward_do_not_decide_a_whole_split():
    split = zeros(1000)
    with as_victim(Unlucky(0.45, shared=True)) as victim:
        seen = predict(victim, split).view(-1, 25)
        assert victim.traits.shared
    assert bool((seen == seen[:, :1]).all())
    assert 0 < float((seen[:, 0] == 0).float().mean()) < 1


def test_every_rate_of_a_repeatable_model_is_what_one_pass_says(trained, digits):
    images, _ = digits.test.take(slice(None))
    with torch.no_grad():
        once = trained.eval()(images).argmax(1)
    with as_victim(trained) as victim:
        assert votes_of(victim, images) == 1
        assert torch.equal(predict(victim, digits.test), once)
        assert torch.equal(vote(victim, images), once)
        assert victim.forwards == 2 * len(images)


def test_rates_of_a_random_model_agree_and_can_be_taken_again(trained, digits):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = trained

        def forward(self, x):
            z = self.model(x)
            return z + 4 * torch.randn_like(z)

    model, ball, few = Noisy(), Ball(eps=0.1, norm="inf"), digits.test.subset(torch.arange(150))
    clean = gb.evaluation.accuracy(model, few)
    with as_victim(model) as victim:
        assert votes_of(victim, few.take(slice(0, 8))[0]) == DEFAULT_VOTES
        assert 1 - score(predict(victim, few), few).error == pytest.approx(clean.value)
        assert control_rates(victim, few, ball, 0) == control_rates(victim, few, ball, 0)
        under = accuracy_under(victim, few, FGSM(eps=0.1), 0)
        assert under == accuracy_under(victim, few, FGSM(eps=0.1), 0)
        assert accuracy_under(victim, few, FGSM(eps=0), 0).value == pytest.approx(clean.value, abs=0.03)
        victim.votes = 1
        assert accuracy_under(victim, few, FGSM(eps=0), 0).value < clean.value - 0.04  # one pass is another number
    assert under.high < clean.low


def test_means_stand_for_draws_and_gradients_flow():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Derandomize():
        assert torch.equal(torch.randn(2, 3), torch.zeros(2, 3))
        assert torch.equal(torch.rand_like(x), torch.full_like(x, 0.5))
        assert torch.randint(3, 10, (2,)).tolist() == [6, 6]
        assert torch.randint(10, (1,)).dtype == torch.int64
        assert torch.randperm(3).tolist() == [0, 1, 2]
        assert torch.normal(2.0, 1.0, (2,)).tolist() == [2, 2]
        assert torch.empty(2).uniform_(1, 3).tolist() == [2, 2]
        assert torch.bernoulli(torch.full((2,), 0.25)).tolist() == [0.25, 0.25]
        assert torch.distributions.Normal(1.0, 2.0).rsample((2,)).tolist() == [1, 1]
        assert torch.multinomial(torch.tensor([0.2, 0.8]), 1).tolist() == [1]
        for dropout in (F.dropout, F.dropout2d):
            kept = dropout(x, 0.4, training=True)
            assert torch.allclose(kept, x)
            (gradient,) = torch.autograd.grad(kept.sum(), x)
            assert torch.allclose(gradient, torch.ones_like(x))
    assert float(torch.randn(3).abs().sum()) > 0


class Dropping(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(F.dropout(x, 0.3, training=True))


class Coin(Dropping):
    def forward(self, x):
        return self.model(x + random.gauss(0, 0.1))


def test_what_a_random_model_answers_over_many_passes_and_without_its_noise(trained, digits):
    clean = gb.evaluation.accuracy(trained, digits)
    with Victim(Dropping(trained)) as victim:
        found = randomness.measure(evidence_of(victim, digits, Suite(eps=(0.1,))))
        assert victim.votes == DEFAULT_VOTES
    assert found.votes == DEFAULT_VOTES
    assert found.lowest < found.mean < found.highest < found.majority.value < clean.value
    assert 0 < found.spread < 0.05
    assert found.noise_off == clean
    assert "replaced by its mean" in found.noise_off_by
    with Victim(trained) as victim:
        assert randomness.measure(evidence_of(victim, digits, Suite(eps=(0.1,)))) is None
    with Victim(Coin(trained)) as victim:
        random.seed(0)
        other = randomness.measure(evidence_of(victim, digits, Suite(eps=(0.1,))))
    assert (other.noise_off, other.noise_off_by) == (None, ELSEWHERE)


def test_two_equal_calls_do_not_prove_that_the_noise_is_off(trained, digits):
    class Rarely(nn.Module):
        """Draws outside of torch, another answer in every fourth call."""

        def __init__(self):
            super().__init__()
            self.inner, self.calls = trained, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x).roll(int(self.calls % 4 == 0), 1)

    with Victim(Rarely()) as victim:
        context = evidence_of(victim, digits, Suite(eps=(0.1,)))
        victim.model.calls = 0
        assert randomness.way_to_quiet(context) == ELSEWHERE


def test_our_own_noise_has_a_switch(digits):
    torch.manual_seed(0)
    model = gb.models.create("lenet5", digits)
    gb.models.add_noise(model, gb.models.FeatureNoise(init=0.3))
    with Victim(model) as victim:
        found = randomness.measure(evidence_of(victim, digits, Suite(eps=(0.1,), votes=5)))
    assert (found.votes, found.noise_off_by) == (5, SWITCHES)
    with gb.models.noise_off(model):
        assert gb.evaluation.accuracy(model, digits) == found.noise_off
