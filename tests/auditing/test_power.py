"""One level for all comparisons of an audit: false alarms by enumeration and simulation, and the stated power."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import beta, binom
from scipy.stats import t as student

from gambeson.auditing import AuditContext
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.outcome import (
    COMPARISONS,
    EARLY,
    FAMILY,
    LEVEL,
    POWER,
    PairedDifference,
    findable_share,
    lower_end,
    smallest_effect,
)
from gambeson.tasks import Counts, Rate


def counts(right):
    return Counts(right.long(), torch.ones(len(right), dtype=torch.long))


def pair(won, lost, n):
    """Outcomes of n images, of which each of two attacks alone breaks some."""
    image = torch.arange(n)
    return counts(image >= lost), counts((image < lost) | (image >= lost + won))


def test_the_comparisons_of_all_diagnostics_are_counted():
    assert sum(diagnostic.comparisons for diagnostic in DIAGNOSTICS) <= COMPARISONS
    assert pytest.approx(FAMILY) == LEVEL * COMPARISONS


@pytest.mark.parametrize("limit", [0.0, 0.02, 0.15])
@pytest.mark.parametrize("n", [25, 60])
def test_no_true_difference_up_to_the_limit_is_called_larger_too_often(n, limit):
    found = {(won, lost) for won in range(n + 1) for lost in range(n + 1 - won)}
    found = {one for one in found if one[0] > one[1] and PairedDifference.of(*pair(*one, n)).low > limit}
    assert found
    for lost in (0.0, 0.01, 0.1, 0.3, (1 - limit) / 2):
        either = min(1.0, 2 * lost + limit)
        if either == 0:
            continue
        wrong = sum(
            binom.pmf(a + b, n, either) * binom.pmf(a, a + b, (lost + limit) / either)  # of those that differ
            for a, b in found
        )
        assert wrong <= LEVEL, (lost, wrong)


@pytest.mark.parametrize("limit", [0.0, 0.03])
def test_nor_is_a_difference_of_two_samples(limit):
    n, draws = 40, torch.arange(41)
    found = [
        (a, b)
        for a in range(n + 1)
        for b in range(a)
        if PairedDifference.across(counts(torch.arange(n) < a), counts(torch.arange(n) < b)).low > limit
    ]
    assert found
    for share in (0.02, 0.3, 0.5, 0.9):
        first, second = binom.pmf(draws, n, share + limit), binom.pmf(draws, n, share)
        assert sum(first[a] * second[b] for a, b in found) <= LEVEL


@pytest.mark.parametrize(("won", "lost", "n"), [(9, 0, 100), (10, 0, 100), (15, 2, 300), (17, 2, 300), (60, 30, 300)])
def test_the_sign_test_decides_whether_there_is_a_difference(won, lost, n):
    clear = binom.sf(won - 1, won + lost, 0.5) <= LEVEL
    assert (PairedDifference.of(*pair(won, lost, n)).low > 0) == clear
    assert PairedDifference.of(*pair(lost, won, n)).high == -PairedDifference.of(*pair(won, lost, n)).low


def looked(draw, sample, wider, limit=0.0):
    context = SimpleNamespace(sample=range(sample), wider=range(wider), subject=SimpleNamespace(random=False))
    sizes = {"sample": sample, "wider": wider}
    return AuditContext.compare_counts(context, lambda on: draw(sizes[on]), limit)


def test_few_honest_audits_fail_any_comparison():
    generator = torch.Generator().manual_seed(0)

    def alike(n):
        chance = torch.rand(2, n, generator=generator)
        return counts(chance[0] < 0.6), counts(chance[1] < 0.6)

    audits = 150
    failed = sum(any(looked(alike, 50, 250).low > 0 for _ in range(COMPARISONS)) for _ in range(audits))
    # At the level of one comparison, 0.05, nine audits of ten would fail.
    assert failed <= binom.ppf(0.999, audits, FAMILY)


@pytest.mark.parametrize(("sample", "wider", "limit"), [(100, 500, 0.02), (100, 500, 0.0), (60, 60, 0.05)])
def test_the_stated_effect_is_found_with_the_stated_power(sample, wider, limit):
    effect = smallest_effect((sample, wider) if wider > sample else (sample,), limit)
    assert limit < effect < 0.3
    generator = torch.Generator().manual_seed(1)
    asked = []

    def weaker_and_stronger(n):
        asked.append(n)
        broken = torch.rand(wider, generator=generator)[:n] < effect
        return counts(torch.ones(n)), counts(~broken)

    trials = 400
    found = sum(looked(weaker_and_stronger, sample, wider, limit).low > limit for _ in range(trials))
    assert binom.ppf(0.001, trials, POWER) <= found <= binom.ppf(0.999, trials, POWER)
    assert wider in asked
    assert asked.count(sample) >= trials  # clear ones are not looked at twice
    assert asked.count(wider) < 1.9 * trials


def test_a_second_look_is_taken_where_the_first_suggests_a_difference_alone():
    def outcomes(won):
        return lambda n: asked.append(n) or pair(won if n == 100 else 40, 0, n)

    for won, sizes in ((1, [100]), (5, [100, 500]), (40, [100])):
        asked = []
        gain = looked(outcomes(won), 100, 500, 0.02)
        assert asked == sizes
        assert (gain.low > 0.02) == (won > 1)
        assert gain.images == sizes[-1]
    words = looked(outcomes(1), 100, 500, 0.02).beyond(0.02)
    assert "not clearly above 2 %" in words
    assert f"({100 * smallest_effect((100, 500), 0.02):.1f} % would be, with 80 % power)" in words
    assert looked(outcomes(5), 100, 500, 0.02).beyond(0.02).endswith("of 500 images, clearly above 2 %")


def test_few_images_find_nothing_and_say_so():
    assert smallest_effect((5,), 0.0) == 1
    assert "nothing would be" in PairedDifference.of(*pair(5, 0, 5)).beyond()
    won, lost = (PairedDifference.of(*pair(*one, 200)) for one in ((30, 10), (10, 30)))
    assert won.beyond().startswith(f"{won} more of 200 images")
    assert lost.beyond().startswith(f"{won} fewer of 200 images, not clearly above 0 %")


def test_rates_are_judged_at_the_same_level():
    for n, limit in ((100, 0.05), (40, 0.25)):
        hits = next(hits for hits in range(n) if lower_end(Rate.of(hits, n)) > limit)
        assert binom.sf(hits - 1, n, limit) <= LEVEL < binom.sf(hits - 2, n, limit)


def test_shares_of_pixels_are_judged_at_that_level_too():
    """Wilson's lower end of the effective number of answers, with Student's quantile of as many maps."""
    rate = Rate.from_variance(0.3, 0.3 * 0.7 / 120, 40, 10_000)
    z, n = float(student.ppf(1 - LEVEL, 39)), 120
    centre, half = 0.3 + z**2 / (2 * n), z * (0.3 * 0.7 / n + z**2 / (4 * n**2)) ** 0.5
    assert lower_end(rate) == pytest.approx((centre - half) / (1 + z**2 / n))


def test_the_power_of_two_looks_by_enumeration():
    """Without images that fall the other way, 14 of 100 are clear at a tenth of the level, or 11 of 500 at the rest."""
    share = smallest_effect((100, 500), 0.0)
    assert 0.5**14 <= EARLY * LEVEL < 0.5**13
    assert 0.5**11 <= (1 - EARLY) * LEVEL < 0.5**10
    found = binom.sf(13, 100, share)
    found += sum(binom.pmf(hits, 100, share) * binom.sf(10 - hits, 400, share) for hits in range(1, 14))
    assert found == pytest.approx(POWER, abs=0.002)


def test_the_power_for_a_share_by_enumeration():
    share = findable_share(24, 0.05)
    hits = next(hits for hits in range(25) if binom.sf(hits - 1, 24, 0.05) <= LEVEL)
    assert binom.sf(hits - 1, 24, share) == pytest.approx(POWER, abs=1e-6)


def test_the_interval_of_two_shares_of_the_same_images_by_hand():
    """Newcombe's method 10 with exact limits, where 40 of 100 fall to one attack alone and 10 to the other."""
    found = PairedDifference.of(*pair(40, 10, 100))
    down = 0.4 - beta.ppf(LEVEL, 40, 61)
    up = beta.ppf(1 - LEVEL, 11, 90) - 0.1
    together = (0.4 * 0.1 / (0.6 * 0.9)) ** 0.5
    assert 0 < found.low == pytest.approx(0.3 - (down**2 + up**2 + 2 * together * down * up) ** 0.5)
