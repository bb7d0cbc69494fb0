"""Benchmarks count the work that they time, and time every candidate."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.auditing import SUITES, AuditRun
from gambeson.studies import BenchSettings, bench_attacks, bench_audit, bench_training, bench_universal

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


def test_an_audit_is_timed_beside_its_own_count_of_forwards_and_backwards(tmp_path):
    data = gb.data.load("digits")
    torch.manual_seed(0)
    gb.models.save(gb.models.create("lenet5", data), tmp_path / "net.safetensors")
    small = SUITES["quick"].model_copy(
        update={"eps": (0.1,), "test_images": 40, "sample": 20, "pgd_steps": 2, "universal_steps": 5, "queries": 5,
                "universal_probe_starts": 0, "eps_uni_runs": 0, "jacobian_backwards": 0,
                "universal_queries": 300, "edits": (), "surrogate": "none"}
    )  # fmt: skip
    run = AuditRun(model=str(tmp_path / "net.safetensors"), data="digits", suite=small)
    found = bench_audit(run, batch_size=16, rounds=3)
    assert found.forwards > found.backwards > 5 * 32  # what the universal attack alone takes
    assert 0 < found.least < found.seconds
    assert found.seconds >= sum(found.stages.values()) > 0
    assert {"per-image", "uap-0.1.safetensors"} <= set(found.stages)


def test_a_black_box_has_no_limit_to_compare_an_audit_with(tmp_path):
    (tmp_path / "box.py").write_text("def answer(images):\n    return images.flatten(1)[:, :10]\n")
    with pytest.raises(UserError, match="bench audit needs gradients"):
        bench_audit(AuditRun(model=f"function:{tmp_path}/box.py:answer", data="digits", suite="quick"))


def test_the_page_of_costs_is_that_of_its_results():
    root = Path(__file__).parents[2]
    scaling = importlib.import_module("scaling")
    found = json.loads((root / "results" / "scaling.json").read_text())
    text = (root / "docs" / "scaling.md").read_text()
    assert scaling.page(text, found) == text
    rows = found["defenses"]["rows"]
    assert len({rows[f"shared-adversarial, s = {s}"]["operations"] for s in (1, 8, 64)}) == 1
    assert rows["ensemble, 5 members"]["operations"] == pytest.approx(5, rel=0.01)
    for steps, ratio in found["growth"]["steps"].items():  # a gradient of an image is two forwards, a plain step three
        assert ratio == pytest.approx((2 * int(steps) + 3) / 3, rel=0.02)
    assert found["attacks"]["per image"]["pgd, 20 steps"] == [20, 20]
