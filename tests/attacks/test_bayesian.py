"""Bayesian search: the Gaussian process by its formulas, the search by known optima."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gambeson as gb
from gambeson.attacks.universal.bayesian import (
    GaussianProcess,
    _likelihood,
    expected_improvement,
    first_points,
    latin_hypercube,
    matern,
    maximise,
    propose,
)
from gambeson.attacks.universal.procedural import GaborNoise
from gambeson.base import generator


def cube(count, size, seed=0):
    return torch.rand(count, size, generator=generator(seed, "cube"), dtype=torch.float64)


def test_kernel_by_hand():
    one, other = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    far = math.sqrt(5) * 0.5
    assert matern(one, other)[0].tolist() == pytest.approx([(1 + far + far**2 / 3) * math.exp(-far), 1.0])


def test_process_goes_through_what_it_saw_and_forgets_it_far_away():
    points = cube(12, 2) * 0.3
    values = (points[:, 0] * 6).sin() + points[:, 1]
    process = GaussianProcess.fitted(points, values)
    mean, deviation = process.at(points)
    torch.testing.assert_close(mean, values, atol=1e-3, rtol=0)
    assert float(deviation.max()) < 0.01 * float(values.std())
    mean, deviation = process.at(torch.full((1, 2), 100.0))
    assert float(mean) == pytest.approx(float(values.mean()))
    assert float(deviation) == pytest.approx(math.sqrt(process.signal) * process.unit)
    # Between the points it is right, and it knows how right.
    fresh = cube(50, 2, seed=1) * 0.3
    mean, deviation = process.at(fresh)
    truth = (fresh[:, 0] * 6).sin() + fresh[:, 1]
    assert ((mean - truth).abs() <= 4 * deviation + 1e-3).all()


def test_likelihood_is_that_of_the_gaussian_and_an_idle_axis_is_found():
    points = cube(9, 2)
    target = torch.randn(9, 1, generator=generator(0, "values"), dtype=torch.float64)
    scales, noise = torch.tensor([[0.4, 0.7]], dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
    base = matern(points / scales, points / scales) + 0.05 * torch.eye(9, dtype=torch.float64)
    signal = float((target.T @ torch.linalg.solve(base, target)) / 9)  # where the likelihood is highest
    for factor in (0.5, 1.0, 2.0):
        whole = torch.distributions.MultivariateNormal(torch.zeros(9, dtype=torch.float64), factor * signal * base)
        exact = float(whole.log_prob(target.squeeze(1))) + 9 / 2 * (1 + math.log(2 * math.pi))
        found = float(_likelihood(points, target, scales, noise))
        assert found == pytest.approx(exact) if factor == 1 else found > exact
    points = cube(30, 2, seed=3)
    fitted = GaussianProcess.fitted(points, (9 * points[:, 0]).sin())
    assert fitted.scales[1] >= 4 * fitted.scales[0]


def test_expected_improvement_is_the_mean_of_the_gain():
    mean, deviation = torch.tensor([0.2, 1.0, 1.4], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.1]).double()
    samples = mean + deviation * torch.randn(400_000, 3, generator=generator(0, "gain"), dtype=torch.float64)
    torch.testing.assert_close(
        expected_improvement(mean, deviation, 1.0), (samples - 1).clamp(min=0).mean(0), atol=3e-3, rtol=0
    )
    sure = expected_improvement(torch.tensor([0.5, 1.5]), torch.zeros(2), 1.0)
    assert sure.tolist() == [0.0, 0.5]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
def test_first_points_fill_every_slice_of_every_axis(count, size, seed):
    points = latin_hypercube(count, size, generator(seed, "first"))
    assert torch.equal((points * count).long().sort(0).values, torch.arange(count).view(-1, 1).expand(-1, size))


@pytest.mark.parametrize("budget", [1, 2, 5, 12])
def test_budget_is_kept_points_are_inside_and_runs_repeat(budget):
    seen = []

    def bowl(point):
        seen.append(point)
        return -float((point - 1).square().sum())  # its maximum is a corner

    best, value = maximise(bowl, 3, budget, generator(5, "search"))
    assert len(seen) == budget
    assert all(((point >= 0) & (point <= 1)).all() for point in seen)
    assert value == max(-float((point - 1).square().sum()) for point in seen)
    again, _ = maximise(bowl, 3, budget, generator(5, "search"))
    assert torch.equal(best, again)
    maximise(bowl, 3, budget, generator(6, "search"))
    assert not torch.equal(seen[0], seen[-budget])


def test_a_function_that_is_flat_or_seen_twice_at_one_point_is_no_trouble():
    assert maximise(lambda point: 0.25, 2, 12, generator(0, "flat"))[1] == 0.25
    points = torch.full((6, 2), 0.5)
    place = propose(points, torch.tensor([0.1, 0.3, 0.2, 0.1, 0.3, 0.2]), generator(0, "same"))
    assert ((place >= 0) & (place <= 1)).all()


def test_needs_far_fewer_evaluations_than_random_search_on_a_smooth_function():
    weights = torch.tensor([30.0, 8.0, 2.0], dtype=torch.float64)
    wins, close = 0, 0
    for seed in range(10):
        place = cube(1, 3, seed)[0] * 0.8 + 0.1
        seen = []

        def hill(point, place=place, seen=seen):
            seen.append(float(torch.exp(-((point - place).square() * weights).sum())))
            return seen[-1]

        maximise(hill, 3, 24, generator(seed, "bayes"))
        ours = max(seen)
        for point in cube(240, 3, seed=100 + seed):
            hill(point)
        wins += ours > max(seen[24:])  # with a tenth of its looks
        close += ours > 0.99
    assert wins >= 8
    assert close >= 8


def test_patterns_it_tries_on_a_trained_net_are_stronger_than_random_ones(trained, digits):
    # Not the best one: on 8 x 8 pixels the luck of the hash decides that, and random search finds it as often.
    def typical(search):
        settings = {"patterns": 30, "finalists": 30, "images": 200}
        found = [
            GaborNoise(eps=0.3, search=search, **settings).craft(trained, digits, seed=seed).about for seed in range(2)
        ]
        rates = [rate for about in found for _, rate in about.restarts]
        assert len(rates) == 60
        return sum(rates) / len(rates)

    clean = gb.evaluation.accuracy(trained, digits.validation).complement.value
    assert typical("bayesian") > typical("random") + 0.02 > clean


def test_how_many_points_are_spread_first():
    assert [first_points(budget, 3) for budget in (1, 2, 10, 100)] == [1, 1, 5, 8]
