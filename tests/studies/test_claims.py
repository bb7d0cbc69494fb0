"""Claims: effects, intervals and verdicts against closed forms."""

import math
import random

import pytest
from scipy import stats

from gambeson.base import UserError
from gambeson.studies.claims import Claim
from gambeson.studies.measures import Value
from gambeson.studies.verdicts import Point, best_variant, front, judge

PLACE = [("d", "m")]


def points(label, values, *, metric="a.uer", variant="", at="steps", n=0, data="d", **more):
    """One row per seed."""
    return [
        Point(
            data=data,
            model="m",
            defense=label,
            variant=variant,
            at=at,
            seed=seed,
            values={metric: Value(value=value, n=n), **{k.replace("__", "."): Value(value=v) for k, v in more.items()}},
        )
        for seed, value in enumerate(values)
    ]


def claim(**fields):
    return Claim(**{"statement": "s", "metric": "a.uer", "of": "new", "to": "old", **fields})


def only(found):
    return found.findings[0]


def test_the_interval_is_students_over_paired_differences():
    new, old = [0.30, 0.42, 0.35, 0.31], [0.50, 0.58, 0.52, 0.55]
    found = only(judge("C", claim(at_most=-0.1), points("new", new) + points("old", old), "steps", PLACE))
    low, high = stats.ttest_rel(new, old).confidence_interval(0.95)
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert found.effect == pytest.approx(sum(new) / 4 - sum(old) / 4)
    assert found.verdict == "reproduced"
    # Unpaired, the spread between seeds would hide it.
    assert found.high - found.low < 0.2


@pytest.mark.parametrize(("margin", "verdict"), [(-0.3, "not reproduced"), (-0.199, "undecided"), (-0.1, "reproduced")])
def test_the_margin_decides(margin, verdict):
    rows = points("new", [0.30, 0.31, 0.29]) + points("old", [0.50, 0.51, 0.495])
    found = only(judge("C", claim(at_most=margin), rows, "steps", PLACE))
    assert found.verdict == verdict
    mirrored = claim(of="old", to="new", at_least=-margin)
    assert only(judge("C", mirrored, rows, "steps", PLACE)).verdict == verdict


def test_a_ratio_is_judged_on_logarithms():
    ratios = [2.0, 3.0, 2.5]
    rows = points("new", ratios, metric="a.eps_uni") + points("old", [1.0, 1.0, 1.0], metric="a.eps_uni")
    found = only(judge("C", claim(metric="a.eps_uni", how="ratio", at_least=1), rows, "steps", PLACE))
    logs = stats.ttest_1samp([math.log(one) for one in ratios], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx([math.exp(end) for end in logs])
    assert found.effect == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert found.verdict == "reproduced"


def test_none_out_of_n_has_a_ratio_and_no_length_none():
    rows = points("new", [0.0, 0.0], n=99) + points("old", [0.5, 0.5], n=99)
    found = only(judge("C", claim(how="ratio", at_most=1), rows, "steps", PLACE))
    assert found.effect == pytest.approx((0.5 / 100) / ((0.5 * 99 + 0.5) / 100))
    rows = points("new", [0.0, 0.0], metric="a.eps_uni") + points("old", [0.5, 0.5], metric="a.eps_uni")
    found = only(judge("C", claim(metric="a.eps_uni", how="ratio", at_most=1), rows, "steps", PLACE))
    assert found.verdict == "not run"
    assert "which has no ratio" in found.note


def test_the_seeds_that_would_decide_are_the_fewest():
    values = [0.02, -0.01, 0.03]
    found = only(judge("C", claim(at_least=0, to=None, how="value"), points("new", values), "steps", PLACE))
    assert found.verdict == "undecided"
    n, mean, sd = found.seeds_to_decide, sum(values) / 3, stats.tstd(values)
    half = [stats.t.ppf(0.975, k - 1) * sd / math.sqrt(k) for k in (n - 1, n)]
    assert half[0] >= abs(mean) > half[1]
    tie = only(judge("C", claim(at_least=0, to=None, how="value"), points("new", [0.1, -0.1]), "steps", PLACE))
    assert (tie.verdict, tie.seeds_to_decide) == ("undecided", None)


def test_one_seed_decides_nothing_and_none_is_not_run():
    rows = points("new", [0.1]) + points("old", [0.9])
    found = only(judge("C", claim(at_most=0), rows, "steps", PLACE))
    assert (found.verdict, found.seeds_to_decide) == ("undecided", None)
    assert found.words == "undecided; a single seed says something, and an interval takes two"
    found = judge("C", claim(at_most=0), points("old", [0.9, 0.9]), "steps", PLACE)
    assert (found.verdict, only(found).note) == ("not run", "seeds 0, 1: new is not run")
    assert judge("C", claim(at_most=0), rows, "seconds", PLACE).verdict == "not run"
    assert only(judge("C", claim(at_most=0), rows, "seconds", PLACE)).words == "not run"


def test_one_seed_of_three_that_says_something_is_told_with_why_the_others_do_not():
    rows = points("old", [0.9, 0.9, 0.8], train__learnt=1.0) + points("new", [0.1, 0.9, 0.9], train__learnt=0.0)
    rows[3].values["train.learnt"] = Value(value=1.0)
    found = only(judge("C", claim(at_most=0), rows, "steps", PLACE))
    assert (found.verdict, found.seeds_to_decide, found.low) == ("undecided", None, None)
    assert "a single seed says something, and an interval takes two; seeds 1, 2: new has not learnt" in found.words
    assert "would decide" not in found.words


def test_equal_effects_have_no_number_of_seeds_that_would_decide():
    rows = points("new", [0.1, 0.1]) + points("old", [0.5, 0.5])
    found = only(judge("C", claim(at_most=0), rows, "steps", PLACE))
    assert found.words.startswith("undecided; the seeds agree to the last digit")
    tie = only(judge("C", claim(at_least=0, to=None, how="value"), points("new", [0.1, -0.1]), "steps", PLACE))
    assert tie.words == "undecided; no number up to 10,000 of seeds would decide it"


def test_a_model_that_has_not_learnt_says_nothing():
    rows = points("new", [0.9, 0.9], train__learnt=0.0) + points("old", [0.9, 0.9], train__learnt=1.0)
    found = judge("C", claim(at_most=0), rows, "steps", PLACE)
    assert found.verdict == "not run"
    assert "new has not learnt" in only(found).note
    assert only(found).words.startswith("seeds 0, 1: new has not learnt")
    fronts = claim(at_most=0, matched="c.accuracy")
    rows = points("new", [0.9] * 2, train__learnt=0.0, c__accuracy=0.5) + points("old", [0.9] * 2, c__accuracy=0.5)
    assert only(judge("C", fronts, rows, "steps", PLACE)).words == "seeds 0, 1: new has not learnt"
    ask = claim(how="correlation", of={"metric": "c.accuracy"}, to=None, at_least=0)
    assert "and 1 of 2 have learnt" in only(judge("C", ask, rows, "steps", PLACE)).words


def test_one_of_several_places_refutes_a_claim_as_rarely_as_a_single_one():
    """At the margin itself a claim about eight places is called not reproduced in one of twenty studies at the most."""
    draw, places, refuted = random.Random(0), [(f"d{k}", "m") for k in range(8)], 0
    for _ in range(300):
        rows = []
        for data, _ in places:
            rows += points("old", [0.5] * 5, data=data)
            rows += points("new", [0.6 + draw.gauss(0, 0.02) for _ in range(5)], data=data)
        refuted += judge("C", claim(at_most=0.1), rows, "steps", places).verdict == "not reproduced"
    assert 1 <= refuted <= 20  # of 300; 7.5 at the level of each side, and 60 without the correction


def test_the_verdict_on_a_place_is_that_of_its_interval():
    rows = points("new", [0.30, 0.31, 0.29]) + points("old", [0.33, 0.335, 0.33])
    places = [*PLACE, ("e", "m"), ("f", "m")]
    one, three = (
        judge("C", claim(of="old", to="new", at_least=0.055), rows, "steps", some) for some in (PLACE, places)
    )
    assert one.findings[0] == three.findings[0]
    assert one.findings[0].high < 0.055
    assert (one.verdict, three.verdict) == ("not reproduced", "undecided")  # which takes 98.3 % confidence


def test_any_needs_wider_intervals_than_all():
    good = [0.3, 0.34, 0.32]
    rows = [row for data in "de" for row in points("new", good, data=data) + points("old", [0.5] * 3, data=data)]
    rows = [row for row in rows if (row.data, row.defense) != ("e", "new")] + points("new", [0.7, 0.72, 0.74], data="e")
    places = [("d", "m"), ("e", "m")]
    every = judge("C", claim(at_most=0), rows, "steps", places)
    some = judge("C", claim(at_most=0, need="any"), rows, "steps", places)
    assert [one.verdict for one in every.findings] == ["reproduced", "not reproduced"]
    assert (every.verdict, some.verdict) == ("not reproduced", "reproduced")
    assert some.findings[0].high - some.findings[0].low > every.findings[0].high - every.findings[0].low
    low, high = stats.ttest_1samp([one - 0.5 for one in good], 0).confidence_interval(0.975)
    assert (some.findings[0].low, some.findings[0].high) == pytest.approx((low, high))


def test_a_front_has_no_dominated_point():
    found = front([(0.9, 1), (0.8, 2), (0.85, 0.5), (0.7, 2), (0.7, 3)], across=1, along=1)
    assert found == [(0.7, 3), (0.8, 2), (0.9, 1)]
    assert front([(0.9, 1), (0.8, 2), (0.7, 0.5)], across=1, along=-1) == [(0.7, 0.5), (0.9, 1)]


def test_fronts_are_compared_at_equal_accuracy_without_extrapolation():
    rows = []
    for variant, clean, eps in (("x", 0.9, 1.0), ("y", 0.7, 4.0)):
        rows += points("old", [eps, eps], metric="a.eps_uni", variant=variant, c__accuracy=clean)
    for variant, clean, eps in (("x", 0.8, 2 * 2), ("y", 0.7, 2 * 4), ("z", 0.5, 100)):
        rows += points("new", [eps, eps], metric="a.eps_uni", variant=variant, c__accuracy=clean)
    ask = claim(metric="a.eps_uni", how="ratio", at_least=1, matched="c.accuracy")
    # On logarithms both fronts are lines between 0.7 and 0.8, and the new one has twice the eps at each accuracy.
    assert only(judge("C", ask, rows, "steps", PLACE)).effect == pytest.approx(2)
    apart = [row for row in rows if row.defense == "old"] + points("new", [9, 9], metric="a.eps_uni", c__accuracy=0.5)
    found = judge("C", ask, apart, "steps", PLACE)
    assert found.verdict == "not run"
    assert "share no c.accuracy" in only(found).note


def test_a_variant_is_chosen_on_validation_alone():
    rows = []
    for variant, clean, uer, test in (("weak", 0.90, 0.5, 0.5), ("best", 0.89, 0.2, 0.4), ("strong", 0.6, 0.1, 0.0)):
        more = {"train__validation_accuracy": clean, "train__validation_uer": uer}
        rows += points("new", [test, test], variant=variant, **more)
    rows += points("old", [0.6, 0.6], train__validation_accuracy=0.9, train__validation_uer=0.6)
    assert best_variant("new", rows) == "best"
    found = only(judge("C", claim(at_most=0), rows, "steps", PLACE))
    assert found.effect == pytest.approx(0.4 - 0.6)
    strict = claim(at_most=0, keeping={"than": "old", "drop": 0.005})
    assert only(judge("C", strict, rows, "steps", PLACE)).effect == pytest.approx(0.5 - 0.6)
    loose = claim(at_most=0, keeping={"than": "old", "drop": 0.4})
    assert only(judge("C", loose, rows, "steps", PLACE)).effect == pytest.approx(0.0 - 0.6)


def test_a_correlation_compares_two_metrics():
    rows = []
    for k in range(5):
        near, far = k, (3, 1, 4, 0, 2)[k]
        rows += points(f"m{k}", [k / 10, k / 10], a__sharing=near, a__jacobian=far)
    ask = claim(how="correlation", of={"metric": "a.sharing"}, to={"metric": "a.jacobian"}, at_least=0)
    expected = 1 - abs(stats.spearmanr(range(5), (3, 1, 4, 0, 2)).statistic)
    assert only(judge("C", ask, rows, "steps", PLACE)).effect == pytest.approx(expected)
    assert judge("C", ask, rows[:6], "steps", PLACE).verdict == "not run"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"at_least": 0, "at_most": 1}, "either at_least or at_most"),
        ({"at_least": 0, "to": None}, "two sides"),
        ({"at_least": 0, "metric": None}, "expected a metric"),
        ({"at_least": 0, "metric": "uer"}, "unknown metric 'uer'"),
        ({"at_least": 0, "how": "ratio"}, "positive margin"),
        ({"at_least": 0, "of": {"metric": "a.uer"}}, "names its defence"),
        ({"at_least": 0, "how": "correlation"}, "give both"),
    ],
)
def test_a_claim_that_says_nothing_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        claim(**fields)


@pytest.mark.parametrize(
    ("censored", "fields", "verdict"),
    [
        ("new", {"at_most": 1.3}, "undecided"),  # the true ratio may be larger
        ("new", {"at_least": 1.1}, "reproduced"),  # and is then one all the more
        ("new", {"at_least": 1.3}, "undecided"),
        ("old", {"at_least": 1.1}, "undecided"),
        ("old", {"at_most": 1.3}, "reproduced"),
        ("old", {"at_most": 1.1}, "undecided"),
        ("neither", {"at_least": 1.1}, "reproduced"),
    ],
)
@pytest.mark.parametrize("how", ["ratio", "difference"])
def test_a_number_beyond_the_largest_eps_decides_one_way_only(censored, fields, verdict, how):
    rows = points("new", [0.300, 0.303, 0.302]) + points("old", [0.250, 0.251, 0.252])
    for row in rows:
        if row.defense == censored:
            row.values["a.uer"] = row.values["a.uer"].model_copy(update={"censored": True})
    if how == "difference":
        fields = {side: 0.05 + (margin - 1.2) / 4 for side, margin in fields.items()}
    found = only(judge("C", claim(how=how, **fields), rows, "steps", PLACE))
    assert found.verdict == verdict
    assert ("beyond the largest eps" in found.note) == (censored != "neither")
    assert (found.low is None) == (censored != "neither")


def test_seeds_that_agree_do_not_tell_how_far_seeds_differ():
    equal = points("new", [0.505, 0.605], n=200) + points("old", [0.5, 0.6], n=200)
    found = only(judge("C", claim(at_least=0.0), equal, "steps", PLACE))
    assert found.verdict == "undecided"  # one image of 200
    assert found.high - found.low > 2 * 0.01
    many = points("new", [0.505, 0.605], n=20_000) + points("old", [0.5, 0.6], n=20_000)
    assert only(judge("C", claim(at_least=0.0), many, "steps", PLACE)).verdict == "reproduced"
    uncounted = points("new", [0.5, 0.5]) + points("old", [0.25, 0.25])
    found = only(judge("C", claim(at_least=0.0), uncounted, "steps", PLACE))
    assert (found.verdict, found.low) == ("undecided", None)


@pytest.mark.parametrize("step", [0.0, 0.01])
def test_seeds_that_agree_within_a_step_of_a_search_tell_no_spread_either(step):
    rows = points("new", [0.300, 0.301, 0.300], metric="a.eps_uni") + points("old", [0.25] * 3, metric="a.eps_uni")
    for row in rows:
        row.values["a.eps_uni"] = row.values["a.eps_uni"].model_copy(update={"step": step})
    found = only(judge("C", claim(metric="a.eps_uni", how="ratio", at_least=1.17), rows, "steps", PLACE))
    assert found.verdict == ("reproduced" if step == 0 else "undecided")
    if step:  # half of it, of the smaller number
        half = stats.t.ppf(0.975, 2) * (0.005 / 0.25) / math.sqrt(3)
        assert math.log(found.high / found.effect) == pytest.approx(half)


def test_a_variant_that_keeps_an_accuracy_waits_for_it():
    rows = []
    for variant, clean, uer in (("a", 0.5, 0.1), ("b", 0.9, 0.3)):
        rows += points(
            "new", [uer, uer + 0.01], variant=variant, train__validation_accuracy=clean, train__validation_uer=uer
        )
    kept = claim(at_most=0.0, keeping={"than": "std", "drop": 0.02})
    old = points("old", [0.5, 0.52])
    found = only(judge("C", kept, rows + old, "steps", PLACE))
    assert (found.verdict, found.note) == ("not run", "seeds 0, 1: std, whose accuracy is to be kept, is not run")
    std = points("std", [0.5, 0.5], train__validation_accuracy=0.91)
    assert only(judge("C", kept, rows + old + std, "steps", PLACE)).effect == pytest.approx(0.305 - 0.51)
