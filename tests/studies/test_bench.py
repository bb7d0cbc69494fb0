"""Benchmarks count the work that they time, and time every candidate."""

import pytest

from gambeson.studies import BenchSettings, bench_attacks, bench_training, bench_universal

SMALL = BenchSettings(model="lenet5", channels=1, image_size=28, batch_size=4, steps=2, rounds=3)


def forward_operations(images: int) -> int:
    """Of LeNet-5 on 28 x 28: two 5 x 5 convolutions, the first padded, and three linear layers."""
    convolutions = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150
    return 2 * images * (convolutions + 400 * 120 + 120 * 84 + 84 * 10)


def test_work_of_the_bare_loop_is_what_the_formula_says():
    found = {timing.name: timing for timing in bench_attacks(SMALL).timings}
    forward = forward_operations(SMALL.batch_size)
    assert found["bare loop"].work == pytest.approx(SMALL.steps * 2 * forward, rel=0.01)  # a gradient costs a forward
    assert found["bare loop with loss.backward()"].work == pytest.approx(SMALL.steps * 3 * forward, rel=0.01)
    first_look = 16 * forward  # a few images, whatever the batch, and the proof of the fast copy
    assert found["bare loop"].work <= found["gambeson"].work <= found["bare loop"].work + first_look


def test_training_says_what_counting_promises():
    result = bench_training(SMALL)
    assert result.ideal == pytest.approx(9 / 7)
    assert {timing.name for timing in result.timings} >= {"plain loop", "pgd-adversarial", "standard"}
    plain = result.timings[0]
    assert result.images_a_second(plain) == SMALL.batch_size / plain.seconds
    assert 0 < result.share_of_peak(plain) < 1


def test_a_universal_perturbation_is_timed_at_equal_steps():
    few, more = (bench_universal(SMALL.model_copy(update={"steps": steps, "batch_size": 16})) for steps in (2, 6))
    forward = forward_operations(16)
    for result, steps in ((few, 2), (more, 6)):
        bare, ours = result.timings
        assert (bare.name, ours.name) == ("bare loop", "gambeson")
        assert bare.work == pytest.approx(steps * 2 * forward, rel=0.01)
    assert more.timings[1].work - few.timings[1].work == pytest.approx(4 * 2 * forward, rel=0.01)
