import pytest
from hypothesis import given
from hypothesis import strategies as st

from gambeson.evaluation import Rate


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


def test_pixels_of_one_image_do_not_count_as_independent():
    wide, narrow = Rate.of(300, 1000, n=10), Rate.of(300, 1000)
    assert wide.value == narrow.value
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert Rate.of(0, 0) == Rate(value=0, low=0, high=1, n=0)
