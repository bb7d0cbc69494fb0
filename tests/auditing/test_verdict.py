"""The verdict in words: what it leads with, which numbers stand beside it, and what a failed check does to it."""

import re

import pytest

from gambeson.auditing.results import (
    Check,
    ModelInfo,
    PerImageResult,
    RandomnessResult,
    TransferredResult,
    UniversalResult,
)
from gambeson.auditing.verdict import judge
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import Control, Cost, EpsAdv, EpsUni

CLEAN = Rate.of(987, 1000)
FOUND = EpsUni(delta=0.5, value=0.12, censored=False, tolerance=0.002, tried=[], split="test", cost=Cost())


def points(errors, eps=0.1):
    control = Control(name="random-sign", mean=0.02, worst=Rate.of(31, 1000), draws=10)
    return [
        UniversalResult(
            eps=radius,
            norm="inf",
            uer=Rate.of(wrong, 1000),
            fooling=Rate.of(wrong, 1000),
            controls=[control],
            restarts=[],
            file="",
            status="done",
            cost=Cost(),
        )
        for radius, wrong in ((eps / 2, 20), (eps, errors), (2 * eps, 990))
    ]


def per_image(right, attack="pgd", eps=0.1):
    return PerImageResult(attack=attack, settings={}, eps=eps, norm="inf", accuracy=Rate.of(right, 1000), cost=Cost())


def moved(wrong, universal=True, eps=0.1):
    return TransferredResult(
        source="surrogate (lenet5)",
        attack="stochastic-pgd" if universal else "mi-fgsm",
        universal=universal,
        eps=eps,
        norm="inf",
        error=Rate.of(wrong, 1000),
        cost=Cost(),
    )


def subject(**facts):
    return ModelInfo(label="m", name="lenet", parameters=1, fingerprint="f", **facts)


@pytest.mark.parametrize(
    ("errors", "lead"),
    [
        (800, "Broken by one pattern at eps 0.1"),
        (532, "Broken by one pattern at eps 0.1"),
        (510, "On the edge of an error of 50 % under one pattern at eps 0.1"),
        (480, "On the edge of an error of 50 % under one pattern at eps 0.1"),
        (60, "Not brought to an error of 50 % by one pattern at eps 0.1"),
    ],
)
def test_the_interval_at_the_middle_eps_decides_the_lead(errors, lead):
    verdict = judge(CLEAN, points(errors), FOUND, [])
    assert verdict.trusted
    assert verdict.reasons == []
    assert verdict.summary.startswith(f"{lead}: it misclassifies {Rate.of(errors, 1000)} of test images")
    assert f"{CLEAN.complement} when clean and {Rate.of(31, 1000)} under the strongest control" in verdict.summary
    assert verdict.summary.endswith("eps_uni(0.5) is at most 0.12.")
    assert len(re.findall(r"\[\d", verdict.summary)) == 3  # every rate with its interval


def test_a_model_that_is_wrong_as_it_is_was_not_broken_by_a_pattern():
    said = judge(Rate.of(250, 1000), points(800), FOUND, []).summary
    assert said.startswith(
        "At an error of 50 % before any pattern is added; under one at eps 0.1: it misclassifies 80.0"
    )
    assert judge(Rate.of(600, 1000), points(800), FOUND, []).summary.startswith("Broken by one pattern")


def test_the_worst_attack_on_single_images_stands_beside_it():
    rows = [per_image(300), per_image(120, "standard"), per_image(5, "pgd", eps=0.3)]
    said = judge(CLEAN, points(60), FOUND, [], per_image=rows).summary
    lowest = Rate.of(120, 1000, candidates=2)  # chosen between the two attacks of this eps
    assert f"Under the worst per-image attack (standard), {lowest} stay right." in said
    said = judge(CLEAN, points(60), FOUND, [], per_image=rows, transfer=[moved(950, universal=False)]).summary
    assert "Under the worst per-image attack (mi-fgsm on surrogate (lenet5)), 5.0 % [3.6, 6.9] stay right." in said


def test_a_transferred_pattern_that_does_more_harm_takes_the_lead():
    said = judge(CLEAN, points(60), FOUND, [], transfer=[moved(700), moved(999, eps=0.2)]).summary
    assert said.startswith("Broken by one pattern at eps 0.1: the one of surrogate (lenet5) misclassifies 70.0 %")
    assert f"against {Rate.of(60, 1000)} under the crafted one" in said
    weaker = judge(CLEAN, points(60), FOUND, [], transfer=[moved(50)]).summary
    assert weaker == judge(CLEAN, points(60), FOUND, []).summary


def beaten(control, crafted=400, name="chessboard", chosen=True):
    """An audit at whose middle eps a control does more harm than what was crafted."""
    low, middle, high = points(crafted)
    rival = Control(name=name, mean=control / 1000, worst=Rate.of(control, 1000), draws=1)
    update = {"controls": [rival, *middle.controls]}
    if chosen:
        update |= {"attack": name, "uer": Rate.of(control, 1000), "crafted": Rate.of(crafted, 1000)}
    return [low, middle.model_copy(update=update), high]


def test_a_control_that_does_more_harm_is_the_headline():
    said = judge(CLEAN, beaten(580), FOUND, []).summary
    called = "the chessboard pattern misclassifies"
    assert said.startswith(f"Broken by one pattern at eps 0.1: {called} {Rate.of(580, 1000)} of")
    assert f"against {Rate.of(400, 1000)} under the crafted one, {CLEAN.complement}" in said
    assert "under the strongest other control (random-sign)" in said


@pytest.mark.parametrize("control", range(430, 620, 10))
@pytest.mark.parametrize("chosen", [True, False])
def test_no_model_is_said_to_stand_that_a_control_brings_down(control, chosen):
    """Whatever validation chose: the intervals of three rates at once leave 50 % out up to 460 and from 540 of 1000."""
    said = judge(CLEAN, beaten(control, chosen=chosen), FOUND, []).summary
    assert said.startswith("Not brought") == (control <= 460)
    if control >= 540:
        assert said.startswith("Broken by one pattern at eps 0.1: the chessboard pattern misclassifies")
    edge = said.startswith("On the edge")
    own = Rate.of(
        control if chosen else 400, 1000
    )  # an interval beside "on the edge" holds 50 %, or the reason follows
    most = (
        f"may be as high as {100 * Rate.of(max(control, 400), 1000, candidates=3).high:.1f} %: more images would tell."
    )
    assert (most in said) == (edge and own.high < 0.5)
    assert ("may be as high as" in said) == (most in said)


def test_the_smallest_eps_have_their_intervals():
    found = FOUND.model_copy(update={"low": 0.11, "high": 0.13})
    each = EpsAdv(**FOUND.model_copy(update={"value": 0.02, "low": 0.018, "high": None}).plain(), images=100)
    said = judge(CLEAN, points(60), found, [], each=each).summary
    assert said.endswith("eps_uni(0.5) is at most 0.12 [0.11, 0.13], eps_adv(0.5) at most 0.02 [0.018 or more].")


def test_a_random_model_and_a_black_box_are_said_to_be_so():
    found = RandomnessResult(
        votes=21,
        mean=0.951,
        spread=0.004,
        lowest=0.94,
        highest=0.96,
        majority=CLEAN,
        noise_off=Rate.of(990, 1000),
        noise_off_by="switches",
    )
    said = judge(CLEAN, points(60), FOUND, [], subject=subject(random=True), randomness=found).summary
    assert (
        "The model is random: the majority of 21 passes decides an image, and a single pass gets 95.1 % ± 0.4" in said
    )
    assert f"with its noise off it gets {Rate.of(990, 1000)}." in said
    single = judge(CLEAN, points(60), FOUND, [], randomness=found.model_copy(update={"votes": 1})).summary
    assert "one pass decided every image" in single
    box = subject(black_box=True)
    assert "Only queries were possible" in judge(CLEAN, points(60), FOUND, [], subject=box).summary
    assert "Only queries" not in judge(CLEAN, points(900), FOUND, [], subject=box).summary  # broken is broken


def test_a_failed_check_turns_the_verdict_and_is_a_reason_with_a_remedy():
    checks = [
        Check(
            name="no vanishing gradients",
            passed=False,
            detail="150 of 200 are dead",
            explanation="Why.",
            remedy="Do so.",
        ),
        Check(name="no EOT gap", passed=None, detail="not random"),
        Check(name="perturbation budget used", passed=True, detail="all of it"),
    ]
    verdict = judge(CLEAN, points(800), FOUND, checks)
    assert not verdict.trusted
    assert verdict.reasons == ["no vanishing gradients: failed, 150 of 200 are dead. Why. Do so."]
    assert verdict.summary.startswith("Not to be trusted (failed: no vanishing gradients). Broken by one pattern")
    assert "What attacks did reach stands" in verdict.summary
    assert judge(CLEAN, points(800), FOUND, checks[1:]).trusted
    never = judge(CLEAN, points(60), FOUND.model_copy(update={"value": 1.0, "censored": True}), [])
    assert never.summary.endswith("eps_uni(0.5) is more than 1.")


def test_checks_that_were_not_run_are_no_reason_to_trust():
    ran = [Check(name="a", passed=True, detail="d"), Check(name="b", passed=None, detail="does not apply")]
    verdict = judge(CLEAN, points(60), FOUND, ran, unchecked=["c", "d", "e", "f"], left_out="The 2 minutes left out x.")
    assert not verdict.trusted
    assert verdict.summary.startswith(
        "The 2 minutes left out x. Not checked for c, d, e and 1 more: 1 of 6 checks were run, none failed and 1 "
        "did not apply. Not "
    )
    assert verdict.reasons == [
        "1 of 6 checks were run and 1 did not apply. For the others run a larger suite, or give it more time."
    ]
    assert verdict.unchecked == ["c", "d", "e", "f"]
    failed = judge(CLEAN, points(60), FOUND, [Check(name="a", passed=False, detail="d")], unchecked=["c"])
    assert failed.summary.startswith("Not to be trusted (failed: a).")
    assert len(failed.reasons) == 2
    assert judge(CLEAN, points(60), FOUND, ran).trusted
