"""Rates of label maps: shares of many answers per image, with intervals by bootstrap over images."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson.base import UserError
from gambeson.tasks import Difference, Rate

PIXELS = 1000


def maps(images, truth, draw, likeness=0.2):
    """Right pixels of images whose shares of right pixels differ, with the correlation ``likeness`` between pixels."""
    scale = (1 - likeness) / likeness
    concentration = torch.tensor([truth * scale, (1 - truth) * scale]).expand(images, 2)
    shares = torch._sample_dirichlet(concentration, draw)[:, 0].double()
    totals = torch.randint(PIXELS // 2, PIXELS + 1, (images,), generator=draw)
    return torch.binomial(totals.double(), shares, generator=draw).long(), totals


def covered(rates, truth):
    return sum(rate.low <= truth <= rate.high for rate in rates) / len(rates)


@pytest.mark.parametrize(("images", "truth"), [(8, 0.5), (40, 0.7), (100, 0.9)])
def test_the_bootstrap_over_images_covers_and_pixels_as_independent_do_not(images, truth):
    draw = torch.Generator().manual_seed(0)
    made = [maps(images, truth, draw) for _ in range(400)]
    rates = [Rate.bootstrap(*one, seed=k) for k, one in enumerate(made)]
    assert 0.925 <= covered(rates, truth) <= 0.98
    assert covered([Rate.of(int(hits.sum()), int(totals.sum())) for hits, totals in made], truth) < 0.35
    # One answer per image would cover, too, by being more than twice as wide as it has to be.
    cautious = [Rate.of(round(float(rate.value) * images), images) for rate in rates]
    width = [sum(one.high - one.low for one in some) for some in (rates, cautious)]
    assert width[1] > 1.4 * width[0]


def test_the_highest_of_many_rates_of_maps_is_covered():
    draw = torch.Generator().manual_seed(1)
    plain, widened = [], []
    for _ in range(60):
        rates = [Rate.bootstrap(*maps(40, 0.7, draw)) for _ in range(20)]
        plain.append(max(rates, key=lambda rate: rate.value))
        widened.append(Rate.highest(rates))
    assert covered(plain, 0.7) < 0.7
    assert covered(widened, 0.7) >= 0.95
    assert all(
        rate.candidates == 20 and rate.effective == one.effective for rate, one in zip(widened, plain, strict=True)
    )
    assert widened[0].high - widened[0].low < 2 * (plain[0].high - plain[0].low)


@given(st.integers(0, 50), st.integers(0, 10))
def test_one_answer_per_image_is_the_interval_of_independent_trials(hits, ignored):
    right = torch.tensor([1] * hits + [0] * (50 - hits) + [0] * ignored)
    counted = torch.tensor([1] * 50 + [0] * ignored)
    assert Rate.bootstrap(right, counted) == Rate.of(hits, 50)


def test_whole_images_right_or_wrong_are_as_good_as_one_answer_each():
    """The effective number of answers is the number of images, up to the sampling error of the bootstrap."""
    right = torch.arange(200) % 4 == 0
    rate = Rate.bootstrap(right.long() * PIXELS, torch.full((200,), PIXELS))
    assert rate.effective == pytest.approx(200, rel=0.15)
    assert rate.low == pytest.approx(Rate.of(50, 200).low, abs=0.006)


def test_the_error_is_that_of_a_ratio():
    hits, totals = maps(300, 0.6, torch.Generator().manual_seed(2))
    rate = Rate.bootstrap(hits, totals)
    p = int(hits.sum()) / int(totals.sum())
    error = math.sqrt(300 / 299) * float((hits - p * totals).square().sum().sqrt() / totals.sum())
    assert rate.value == pytest.approx(p, abs=1e-12)
    assert p * (1 - p) / rate.effective == pytest.approx(error**2, rel=0.12)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12), st.randoms())
def test_any_counts_give_an_interval_around_their_share_in_any_order(pairs, shuffler):
    rows = [(min(pair), max(pair)) for pair in pairs]
    rate = Rate.bootstrap(*torch.tensor(rows).T)
    hits, total = (sum(column) for column in zip(*rows, strict=True))
    assert rate.value == (hits / total if total else 0)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.high > rate.low
    shuffler.shuffle(rows)
    assert Rate.bootstrap(*torch.tensor([*rows, (0, 0)]).T) == rate
    if 2 * hits == total:  # whichever way round, the same images; only the samples are others
        return
    mirrored = Rate.bootstrap(*torch.tensor([(every - some, every) for some, every in rows]).T)
    assert (mirrored.low, mirrored.high) == (pytest.approx(1 - rate.high), pytest.approx(1 - rate.low))


def test_what_cannot_be_known_is_not_claimed():
    whole = torch.full((20,), 4096)
    assert Rate.bootstrap(whole, whole) == Rate.of(20, 20)  # all right: one answer per image
    assert Rate.bootstrap(torch.tensor([300]), torch.tensor([1000])).high > 0.85  # one image: its spread is unknown
    two = Rate.bootstrap(torch.tensor([300, 320]), torch.tensor([1000, 1000]))
    assert two.high - two.low > 0.15  # two say little more
    none = torch.zeros(3, dtype=torch.long)
    assert Rate.bootstrap(none, none) == Rate.of(0, 0)
    # Of shares that are all alike, or nearly so, the spread is unknown: they are no better than one answer each.
    for offset in (0, 1):
        right = whole // 2
        right[7] += offset
        alike = Rate.bootstrap(right, whole)
        assert alike.effective == 20
        assert alike.high - alike.low > 0.3
    checked = torch.binomial(
        whole.double(), torch.full((20,), 0.5).double(), generator=torch.Generator().manual_seed(3)
    )
    assert Rate.bootstrap(checked.long(), whole).effective > 20 * 1024  # as independent pixels differ


def test_counts_above_two_to_the_24_are_exact():
    hits, totals = torch.tensor([2**24 + 1, 2**24, 1]), torch.tensor([2**25, 2**25, 2**25])
    assert Rate.bootstrap(hits, totals).value == (2**25 + 2) / (3 * 2**25)


@pytest.mark.parametrize(
    ("hits", "totals", "words"),
    [
        (torch.tensor([1.0]), torch.tensor([2]), "expected integers"),
        (torch.tensor([1]), torch.tensor([2, 3]), "expected integers"),
        (torch.tensor([[1]]), torch.tensor([[2]]), "expected integers"),
        (torch.tensor([3]), torch.tensor([2]), "more hits than answers"),
        (torch.tensor([-1]), torch.tensor([2]), "fewer than none"),
    ],
)
def test_what_are_no_counts_is_refused(hits, totals, words):
    with pytest.raises(UserError, match=words):
        Rate.bootstrap(hits, totals)


def ratio(sums):
    return sums[:, 0] / sums[:, 1].clamp(min=1)


def paired(first, second, size=1):
    totals = torch.full((len(first),), size)
    rows = [torch.stack([one * size, totals], 1) for one in (first.long(), second.long())]
    return Difference.of(*rows, ratio, len(first))


@pytest.mark.parametrize(("n", "p", "q"), [(10, 0.9, 0.02), (30, 0.97, 0.0), (60, 0.98, 0.01), (50, 0.0, 0.95)])
def test_a_difference_that_nearly_all_images_share_is_covered(n, p, q):
    """With Student's interval alone 20 to 80 % of these would be: where all images differ alike it has no width."""
    draw = torch.Generator().manual_seed(n)
    found = [paired(*(torch.rand(n, generator=draw) < share for share in (p, q))) for _ in range(400)]
    assert sum(one.low <= p - q <= one.high for one in found) / 400 >= 0.93
    assert all(-1 <= one.low <= one.value <= one.high <= 1 and one.low < one.high for one in found)


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_images_that_all_differ_alike_leave_room_for_others(n):
    one, none = torch.ones(n), torch.zeros(n)
    for size in (1, 500):  # of label maps that are right or wrong as a whole, too
        gain = paired(one, none, size)
        assert gain == Difference.of_pairs(n, 0, n)
        assert gain.low < 1 == gain.value == gain.high
    totals = torch.full((n,), 1000)
    part = Difference.of(*(torch.stack([totals // share, totals], 1) for share in (2, 4)), ratio, n)
    assert part.value == 0.25
    assert (part.low, part.high) == pytest.approx([0.25 * (1 + side * Rate.of(0, n).high) for side in (-1, 1)])
