"""Attacks on copies with a known answer: masked features fail the audit's active test, honest ones pass."""

import pytest
import torch
from torch import nn

from gambeson.auditing.diagnostics import active_test, get
from gambeson.evaluation import Rate
from gambeson.evaluation.binarization import BinarizationResult
from gambeson.evaluation.rates import Cost
from tests.auditing.evidence import held

NAME = "attacks find what is there"
EPS = (0.05, 0.15, 0.3)


def check(model, data, **settings):
    with held(model, data, EPS, pgd_steps=10, queries=50, sample=40, **settings) as evidence:
        evidence.victim.allow_no_graph = True  # as in an audit
        before = evidence.spent
        found = get(NAME).check(evidence)
        return found, evidence.since(before)


class Rounded(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((8 * x).round() / 8)


class ScaledLogits(Rounded):
    def forward(self, x):
        return 1000 * self.model(x)


def test_an_attack_that_finds_what_is_there_passes_and_says_what_it_would_have_found(trained, digits):
    found, cost = check(trained, digits)
    assert found.passed, found.detail
    assert found.numbers["targeted Auto-PGD"] >= 0.95
    assert found.numbers["copies"] >= 10
    assert found.numbers["claimed"] == 0
    assert "% would be found with 80 % power" in found.detail
    # Points of the heads, and random ones, once for all attacks.
    assert 24 * 201 < cost.forwards < 24 * (201 + 100) + 3500
    assert 0 < cost.backwards < 24 * 100


def test_a_gradient_that_is_rounded_away_is_found_too_weak(trained, digits):
    with pytest.warns(UserWarning, match="exactly zero"):
        found, _ = check(Rounded(trained), digits)
    assert found.passed is False, found.detail
    assert found.numbers["targeted Auto-PGD"] < 0.5 < found.numbers["Square"]


def test_the_size_of_the_logits_does_not_matter(trained, digits):
    found, _ = check(ScaledLogits(trained), digits)
    assert found.passed, found.detail


@pytest.mark.parametrize(
    ("copies", "found", "claimed", "passed"),
    [(20, 20, 0, True), (20, 20, 1, False), (20, 10, 0, False), (3, 3, 0, None), (3, 3, 1, False)],
)
def test_a_success_on_a_copy_that_has_none_fails_however_many_are_found(
    copies, found, claimed, passed, trained, digits, monkeypatch
):
    def results(victim, split, attacks, test, *, seed):
        shares = {"success": Rate.of(found, copies), "random": Rate.of(0, copies), "hidden": Rate.of(found, copies)}
        one = BinarizationResult(**shares, failed=0, claimed=claimed, cost=Cost(), shared=Cost())
        return dict.fromkeys(attacks, one)

    monkeypatch.setattr(active_test, "binarization_tests", results)
    check_of, _ = check(trained, digits)
    assert check_of.passed is passed
    if passed is not None:
        assert f"on copies without any, {3 * claimed} successes were claimed" in check_of.detail


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no linear layer"), (None, "not informative: of 0 copies")],
)
def test_where_it_says_nothing_it_says_why(model, reason, digits):
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1), nn.Linear(10, 10))
        nn.init.zeros_(model[1].weight)  # features that are constant
    found, _ = check(model, digits)
    assert found.passed is None
    assert reason in found.detail
