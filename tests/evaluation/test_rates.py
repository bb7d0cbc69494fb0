import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson import UserError
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import crossing_interval, crossings
from gambeson.tasks import Counts, Difference


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (1, 10, 0.01788, 0.40415),
        (81, 263, 0.25528, 0.36622),
        (500, 1000, 0.46907, 0.53093),
    ],
)
def test_wilson_intervals_of_the_literature(hits, n, low, high):
    # 81 of 263 is the worked example of Newcombe (1998), method 3.
    rate = Rate.of(hits, n)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))


@given(st.integers(1, 500), st.data())
def test_intervals_hold_their_value_and_mirror(n, data):
    hits = data.draw(st.integers(0, n))
    rate, other = Rate.of(hits, n), Rate.of(n - hits, n)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.high > rate.low
    assert rate.low == pytest.approx(1 - other.high, abs=1e-12)
    assert rate.complement.value == pytest.approx(other.value)


def _covered(rates, truth):
    return sum(rate.low <= p <= rate.high for rate, p in zip(rates, truth, strict=True)) / len(rates)


def test_the_highest_of_many_is_covered_and_a_plain_interval_is_not():
    """20 candidates of one true rate 0.4 on 200 images each, independent: the worst case for a choice."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.rand(1000, 20, 200, generator=draw).lt(0.4).sum(2)
    plain = [Rate.of(int(row.max()), 200) for row in counts]
    assert _covered(plain, [0.4] * 1000) < 0.75
    for chosen in (Rate.highest, Rate.lowest):
        rates = [chosen(Rate.of(int(hits), 200) for hits in row) for row in counts]
        assert all(rate.candidates == 20 for rate in rates)
        assert _covered(rates, [0.4] * 1000) > 0.95
    # Not by being useless: 20 candidates cost half as much again in width, not several times as much.
    assert rates[0].high - rates[0].low < 1.6 * (plain[0].high - plain[0].low)


def test_the_highest_of_dependent_candidates_is_covered_whatever_their_true_rates():
    """Candidates that share most of their luck and differ in truth; the true rate of the chosen one is what counts."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.tensor([0.30, 0.34, 0.36, 0.36, 0.37])
    shared = torch.rand(1000, 1, 300, generator=draw)
    own = torch.rand(1000, 5, 300, generator=draw)
    lucky = torch.rand(1000, 5, 300, generator=draw) < 0.7
    counts = torch.where(lucky, shared, own).lt(truth[:, None]).sum(2)
    rates = [Rate.highest(Rate.of(int(hits), 300) for hits in row) for row in counts]
    assert _covered(rates, truth[counts.argmax(1)].tolist()) > 0.95
    assert _covered(rates, [0.37] * 1000) > 0.95  # all have the same n, so the highest true rate is covered as well


def test_the_worst_case_of_each_image_is_one_binomial_count():
    """Right under all of four attacks, decided image by image: the plain interval has its 95 %."""
    draw = torch.Generator().manual_seed(2)
    right = torch.rand(2000, 4, 250, generator=draw).lt(0.8).all(1).sum(1)
    assert 0.93 < _covered([Rate.of(int(hits), 250) for hits in right], [0.8**4] * 2000) < 0.97


def test_choices_among_the_chosen_add_up():
    first = Rate.highest([Rate.of(40, 100), Rate.of(60, 100), Rate.of(50, 100)])
    assert (first.value, first.candidates) == (0.6, 3)
    assert first == Rate.of(60, 100, candidates=3)
    again = Rate.highest([first, Rate.of(55, 100)])
    assert again == Rate.of(60, 100, candidates=4)
    assert Rate.lowest([Rate.of(5, 10), first.complement]).candidates == 4
    assert Rate.highest([Rate.of(60, 100)]) == Rate.of(60, 100)
    assert Rate.of(0, 0) == Rate(value=0, low=0, high=1, n=0)
    assert Rate.of(0, 0, candidates=2) == Rate.of(0, 0).among(2)
    # Bonferroni at k = 5: the 99 % interval, whose quantile tables give as 2.5758.
    assert Rate.of(0, 100, candidates=5).high == pytest.approx(2.5758**2 / (100 + 2.5758**2), rel=1e-4)


@pytest.mark.parametrize(
    "numbers", [(-1, 0, 1, 9), (2, 0, 1, 9), (0.5, 0.9, 0.1, 9), (0.5, 0, 1, -5), (0.5, -0.1, 1, 9), (0.5, 0, 1.1, 9)]
)
def test_what_is_no_share_is_refused(numbers):
    with pytest.raises(UserError, match="expected a share of n images and its interval, from 0 to 1; got"):
        Rate(**dict(zip(("value", "low", "high", "n"), numbers, strict=True)))


def curve_of(errors, total):
    """Counts by eps of images whose row of ``errors`` says at which of four eps they are wrong."""
    return {eps: Counts(total - errors[:, k], total) for k, eps in enumerate((0.0, 0.1, 0.2, 0.4))}


def test_images_without_a_label_have_no_part_in_the_interval_of_an_eps():
    errors = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).lt(torch.tensor([0.1, 0.3, 0.5, 0.9])).long()
    expected = crossing_interval(curve_of(errors, torch.ones(50).long()), 0.4, resamples=200)
    padded = torch.cat([errors, torch.zeros(150, 4).long()])
    total = (torch.arange(200) < 50).long()
    assert crossing_interval(curve_of(padded, total), 0.4, resamples=200) == expected
    assert 0.1 < expected[0] < expected[1] < 0.4


def test_the_eps_at_which_a_curve_crosses_is_read_off_its_rising_line():
    radii = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
    errors = [
        [0.1, 0.2, 0.6, 0.8],  # a quarter of the way from 0.2 to 0.6, then
        [0.1, 0.4, 0.2, 0.6],  # the fall is none: what is found at 0.1 is there at 0.2
        [0.3, 0.5, 0.6, 0.9],
        [0.1, 0.2, 0.2, 0.2],
        [0.0, 0.0, 0.3, 0.3],
        [0.1, 0.25, 0.2, 0.6],  # rises from 0.25, which 0.2 has as well
    ]
    found = crossings(radii, torch.tensor(errors, dtype=torch.float64), 0.3)
    assert found.tolist() == pytest.approx([0.125, 0.1 * 2 / 3, 0.0, torch.inf, 0.2, 0.2 + 0.2 / 7])


def test_the_ends_of_the_interval_of_an_eps_are_the_quantiles_of_its_resamples():
    """Of 20 images that fall at 0.2 and 20 that never do: the share that falls decides where 0.4 is crossed."""
    errors = torch.zeros(40, 4).long()
    errors[:20, 2:] = 1
    low, high = crossing_interval(curve_of(errors, torch.ones(40).long()), 0.4, resamples=4000)
    shares = torch.arange(41) / 40
    weights = torch.distributions.Binomial(40, 0.5).log_prob(torch.arange(41.0)).exp().double()
    eps = torch.where(shares >= 0.4, 0.1 + 0.1 * 0.4 / shares.clamp(min=0.4), torch.inf)
    order = eps.argsort()
    below = weights[order].cumsum(0)
    exact = [float(eps[order][int((below < level).sum())]) for level in (0.025, 0.975)]
    assert low == pytest.approx(exact[0], abs=2e-3)
    assert (high is None) == (exact[1] == torch.inf)


def test_a_paired_difference_has_the_interval_of_student():
    """Of one number per image: t s / sqrt(n), s the standard deviation of the differences with n - 1."""
    first = torch.tensor([[3, 4], [4, 4], [2, 4], [4, 4], [1, 4]])
    second = torch.tensor([[1, 4], [3, 4], [2, 4], [0, 4], [1, 4]])
    apart = (first - second)[:, 0].double() / 4
    exact = 2.7764451 * float(apart.std()) / 5**0.5
    found = [Difference.of(first, second, lambda sums: sums[:, 0] / sums[:, 1], 5, seed=seed) for seed in range(20)]
    assert {one.value for one in found} == {float(apart.mean())}
    halves = torch.tensor([one.value - one.low for one in found])
    assert float(halves.mean()) == pytest.approx(exact, rel=0.02)
