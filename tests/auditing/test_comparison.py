"""Comparison of two audits: exact tests on known outcomes, coverage by simulation, and refusals."""

import shutil
import sys
from math import comb
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gambeson as gb
from gambeson import UserError
from gambeson.auditing import AuditResult, Suite, comparison
from gambeson.auditing.context import Outcomes
from gambeson.base import load_tensors, save_tensors, write_json
from gambeson.cli.compare import comparison_table
from gambeson.evaluation import Rate
from gambeson.tasks import Counts

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # synthetic audits with numbers that all differ

from report_audits import write_audit

WRONG = (121, 397, 683, 811, 903)
QUICK = Suite(
    eps=(0.05, 0.1, 0.2),
    universal_steps=20,
    universal_restarts=1,
    universal_probe_starts=0,
    pgd_steps=5,
    pgd_restarts=1,
    suite_images=16,
    suite_queries=30,
    sample=20,
    queries=20,
    surrogate="none",
    jacobian_backwards=0,
    universal_queries=300,
    edits=(),
    checks=("stateless", "no vanishing gradients"),
    eps_uni_runs=0,
    eps_adv=False,
    test_images=80,
    validation_images=60,
)


def one_of(right, n=1000):
    """One answer per image, of which the first so many are right."""
    return Counts((torch.arange(n) < right).long(), torch.ones(n).long())


def stored(folder, test, *, wrong=WRONG, clean=987, **audit):
    """An audit of synthetic numbers, with outcomes that give them: the first images are right."""
    result = write_audit(folder, wrong=wrong, clean=clean, with_jacobian=False, **audit)
    outcomes, rows = Outcomes(folder), torch.arange(1000)
    outcomes.keep("clean", one_of(clean), test, rows)
    for point, errors in zip(result.universal, wrong, strict=True):
        outcomes.keep(f"uer@{point.eps:.4g}", one_of(1000 - errors), test, rows)
    pgd, suite = (round(one.accuracy.value * one.accuracy.n) for one in result.per_image)
    outcomes.keep("per_image:pgd", one_of(pgd), test, rows)
    outcomes.keep("per_image:standard", one_of(suite, 200), test, rows[:200] * 5)
    return folder


def outcome(found):
    return {change.name: change.outcome for change in found.changes}


def test_pairs_are_counted_and_tested_exactly(tmp_path, digits):
    first = stored(tmp_path / "a", digits.test)
    second = stored(tmp_path / "b", digits.test, label="later", wrong=(130, 397, 650, 811, 903), clean=981)
    found = gb.compare(first, second)
    changes = {change.name: change for change in found.changes}
    assert list(changes)[:6] == ["clean", "uer@0.05", "uer@0.1", "uer@0.15", "uer@0.2", "uer@0.3"]
    clean, small, middle = changes["clean"], changes["uer@0.05"], changes["uer@0.15"]
    assert (clean.lost, clean.gained, clean.unpaired) == (6, 0, "")
    assert clean.p == pytest.approx(2 / 2**6)
    assert clean.difference.value == pytest.approx(-0.006)
    assert clean.difference.low < -0.006 < clean.difference.high < 0  # all six changed in one direction
    assert (small.lost, small.gained) == (9, 0)
    assert small.difference.value == pytest.approx(0.009)  # the UER rises
    assert small.p == pytest.approx(2 / 2**9)
    assert (middle.lost, middle.gained) == (0, 33)
    assert changes["uer@0.2"].difference.value == 0
    assert changes["uer@0.2"].p == 1
    assert changes["uer@0.2"].difference.low == pytest.approx(-changes["uer@0.2"].difference.high) != 0
    m = len(found.changes)
    assert middle.adjusted == pytest.approx(min(m, 8) * middle.p)
    assert clean.p < 0.05 < clean.adjusted  # one of eight tests: no longer clear
    assert outcome(found)["clean"] == "no clear change"
    assert (outcome(found)["uer@0.05"], outcome(found)["uer@0.15"]) == ("worse", "better")
    assert found.regressions == ["uer@0.05"]
    other_way = gb.compare(second, first)
    assert other_way.regressions == ["uer@0.15", "per_image:pgd"]
    back = {change.name: change for change in other_way.changes}["clean"]
    assert (back.lost, back.gained, back.p) == (0, 6, clean.p)
    assert back.difference.low == pytest.approx(-clean.difference.high)


def test_a_narrow_terminal_cuts_no_number_and_no_word_of_the_table(tmp_path, digits):
    found = gb.compare(stored(tmp_path / "a", digits.test), stored(tmp_path / "b", digits.test, label="later"))
    with (console := Console(width=60)).capture() as narrow:
        console.print(comparison_table(found))
    shown = narrow.get()
    assert "…" not in shown
    assert shown.count("]") == len(found.changes) + 1
    assert shown.split().count("change") == 2 + len(found.changes)  # the heading and the caption have it too


def test_models_of_one_label_are_called_as_they_were_named(tmp_path, digits):
    same, other = (
        gb.compare(stored(tmp_path / f"{label} a", digits.test), stored(tmp_path / f"{label} b", digits.test, **named))
        for label, named in (("same", {}), ("other", {"label": "later"}))
    )
    names = ("old/model.pth", "new/model.pth")
    assert comparison_table(same, names).title.startswith("old/model.pth and new/model.pth, on")
    assert names[0] not in comparison_table(other, names).title


@pytest.mark.parametrize(("lost", "gained"), [(10, 2), (2, 10), (7, 7), (1, 0), (0, 0), (40, 25)])
def test_mcnemar_by_hand(lost, gained):
    n, k = lost + gained, min(lost, gained)
    by_hand = min(1.0, 2 * sum(comb(n, j) for j in range(k + 1)) / 2**n)
    assert comparison._images(lost, gained, 500, 1)[1] == pytest.approx(by_hand)


def test_intervals_cover_and_tests_rarely_err():
    """Of few and of many changed images; paired, and of two samples."""
    draw = torch.Generator().manual_seed(0)
    for n, lost, gained in ((60, 0.05, 0.05), (100, 0.12, 0.02), (500, 0.01, 0.0)):
        chances = torch.tensor([lost, gained, 1 - lost - gained])
        drawn = torch.distributions.Multinomial(n, chances)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            pairs = drawn.sample((1000,)).long()[:, :2].tolist()
        results = [comparison._images(*pair, n, 1) for pair in pairs]
        covered = sum(one.low <= gained - lost <= one.high for one, _ in results) / 1000
        assert covered > 0.93
        if lost == gained:
            assert sum(p <= 0.05 for _, p in results) / 1000 <= 0.06
    rates = [[Rate.of(int((torch.rand(150, generator=draw) < p).sum()), 150) for p in (0.3, 0.45)] for _ in range(500)]
    found = [comparison._unpaired(*pair)[0] for pair in rates]
    assert sum(one.low <= 0.15 <= one.high for one in found) / 500 > 0.93
    assert sum(one.low > 0 for one in found) > 250  # and they show it


def test_label_maps_are_compared_by_images_not_by_pixels():
    draw = torch.Generator().manual_seed(0)
    total = torch.full((40,), 4096)
    first = torch.randint(1000, 4000, (40,), generator=draw)
    shift = torch.randint(-400, 401, (40,), generator=draw)
    noise, _ = comparison._maps(Counts(first, total), Counts((first + shift).clamp(0, 4096), total), 1)
    _, p = comparison._maps(Counts(first, total), Counts((first + shift).clamp(0, 4096), total), -1)
    assert noise.low < 0 < noise.high
    assert p > 0.05  # of 160,000 pixels, some 8,000 changed
    worse, p = comparison._maps(Counts(first, total), Counts((first + shift // 4 - 200).clamp(0, 4096), total), -1)
    assert 0 < worse.low < worse.value < worse.high
    assert p < 1e-6
    same, p = comparison._maps(Counts(first, total), Counts(first, total), 1)
    assert (same.value, p) == (0, 1)


@pytest.mark.parametrize("n", [3, 6])
def test_few_maps_that_all_change_alike_are_no_proof(n):
    total = torch.full((n,), 900)
    gain, p = comparison._maps(Counts(total // 3, total), Counts(total // 2, total), 1)
    assert gain.value == pytest.approx(1 / 6)
    assert gain.low < gain.value - 0.04 < gain.value + 0.04 < gain.high
    assert p == 2 ** (1 - n)  # as a coin that falls on one side every time


def test_gates_of_a_comparison(tmp_path, digits):
    first = stored(tmp_path / "a", digits.test)
    second = stored(tmp_path / "b", digits.test, wrong=(130, 397, 650, 811, 903), clean=981)
    worse, same = gb.compare(first, second), gb.compare(first, first)
    assert same.gate("no-regression, uer>=0, uer<=0, uer.high<=0.01, clean.low>=-0.01, per_image:pgd>=0").held
    assert not same.gate("uer.high<=0").held  # the images do not show that
    report = worse.gate(
        "no-regression, uer<=-0.03, uer@0.05<=0.02, uer@0.05.high<=1 %, clean>=-0.01, clean>=-0.5 %, per_image>=0"
    )
    assert [gate.held for gate in report.gates] == [False, True, True, False, True, False, False]
    assert report.gates[0].reason == "clearly worse: uer@0.05"
    assert report.gates[-1].reason == "say which: choose among per_image:pgd, per_image:standard"
    for text in ("uer@0.25<=1", "per_image:square>=-1", "mean_iou>=-1", "clean_iou>=-1"):
        assert "was not compared: choose among clean" in worse.gate(text).gates[0].reason
        assert not worse.gate(text).held
    for text in ("trusted", "uer<=-2", "eps_uni<=0.1", "no-regression<=0"):
        with pytest.raises(UserError, match="gate '"):
            worse.gate(text)


def test_numbers_that_cannot_be_trusted_are_a_regression(tmp_path, digits):
    sound = stored(tmp_path / "a", digits.test)
    masked = stored(tmp_path / "b", digits.test, failed=True, wrong=(21, 31, 41, 51, 61))
    found = gb.compare(sound, masked)
    assert found.regressions == ["trusted"]
    assert not found.gate("no-regression").held
    assert "not to be trusted" in found.summary
    both = gb.compare(masked, masked)
    assert both.regressions == []
    assert "not to be trusted" in both.gate("no-regression").gates[0].reason
    assert gb.compare(masked, sound).regressions != ["trusted"]
    less = AuditResult.load(sound)  # every check that was run has passed
    less.model_copy(update={"verdict": less.verdict.model_copy(update={"trusted": False})}).save(sound)
    assert "not all checked" in gb.compare(sound, sound).summary
    assert "not to be trusted" not in gb.compare(sound, sound).summary


def test_other_images_widen_the_interval(tmp_path, digits):
    first = stored(tmp_path / "a", digits.test)
    second = stored(tmp_path / "b", digits.validation, clean=960)
    paired = gb.compare(first, stored(tmp_path / "c", digits.test, clean=960)).changes[0]
    apart = gb.compare(first, second).changes[0]
    assert apart.unpaired == "the test images or their labels differ"
    assert apart.difference.value == pytest.approx(paired.difference.value)
    assert apart.difference.high - apart.difference.low > 1.2 * (paired.difference.high - paired.difference.low)
    assert paired.p < apart.p < 0.01
    (tmp_path / "c" / Outcomes.FILE).unlink()
    assert {one.unpaired for one in gb.compare(first, tmp_path / "c").changes} == {"outcomes per image were not kept"}
    tensors, about = load_tensors(first / Outcomes.FILE)
    tensors["clean right"][0] = 0  # not what was reported
    save_tensors(tmp_path / "b" / Outcomes.FILE, tensors, about)
    shutil.copy(first / "result.json", tmp_path / "b" / "result.json")
    unlike = {one.name: one.unpaired for one in gb.compare(first, tmp_path / "b").changes}
    assert unlike.pop("clean") == "the outcomes that were kept do not give the reported rate"
    assert set(unlike.values()) == {""}


def test_what_cannot_be_compared_is_refused(tmp_path, digits, trained):
    first = stored(tmp_path / "a", digits.test)
    content = AuditResult.load(first).plain()
    few = [f"digit {k}" for k in range(9)]
    changes = {
        "classes: 10 (digit 0, digit 1, digit 2, ...) and 9 (digit 0": {"material": {"classes": few}},
        "name: digits and mnist": {"material": {"name": "mnist"}},
        "shape: [1, 28, 28] and [1, 8, 8]": {"material": {"shape": [1, 8, 8]}},
        "unit: image and pixel": {"material": {"unit": "pixel"}},
        "differ in their settings (norm: inf and 2)": {"settings": {"norm": "2"}},
        "(pgd_restarts: 2 and 1; pgd_steps: 40 and 20)": {"settings": {"pgd_steps": 20, "pgd_restarts": 1}},
        "settings (eps: [0.05, ": {"settings": {"eps": [0.1]}},
        "one model is a black box": {"subject": {"black_box": True}},
    }
    for words, change in changes.items():
        other = {
            name: {**part, **change.get(name, {})} if isinstance(part, dict) else part for name, part in content.items()
        }
        write_json(tmp_path / "b" / "result.json", other)
        for pair in ((first, tmp_path / "b"), (tmp_path / "b", first)):
            with pytest.raises(UserError) as error:
                gb.compare(*pair)
            assert words in str(error.value) or pair[0] != first
    with pytest.raises(UserError, match="does not exist"):
        gb.compare(first, tmp_path / "none")
    with pytest.raises(UserError, match="int cannot be compared"):
        gb.compare(first, 3)
    with pytest.raises(UserError, match="give data as well"):
        gb.compare(first, trained)
    for cut in (first / Outcomes.FILE, first / "result.json"):
        whole = cut.read_bytes()
        cut.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=cut.name):
            gb.compare(first, first)
        cut.write_bytes(whole)
    tensors, about = load_tensors(first / Outcomes.FILE)
    for name, broken in {
        "clean right": tensors["clean right"][:-1],
        "clean total": tensors["clean total"] - 1,
        "clean rows": tensors["clean rows"].double(),
    }.items():
        save_tensors(first / Outcomes.FILE, tensors | {name: broken}, about)
        with pytest.raises(UserError, match="does not hold the outcomes of 'clean'"):
            gb.compare(first, first)


def test_notes_name_what_else_differs(tmp_path, digits):
    first = stored(tmp_path / "a", digits.test)
    content = AuditResult.load(first).plain()
    content["environment"]["gambeson"], content["seed"] = "0.0.9", 7
    write_json(tmp_path / "b" / "result.json", content)
    assert gb.compare(first, tmp_path / "b").notes == [
        "The audits differ in seed: 0 and 7.",
        "The audits differ in gambeson: 0.1.0 and 0.0.9.",
    ]


@pytest.fixture(scope="module")
def audited(trained, digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        worse = gb.models.create("lenet5", digits)
    worse.load_state_dict(trained.state_dict())
    with torch.no_grad():
        last = [weight for weight in worse.parameters() if weight.ndim == 2][-1]
        last += 0.6 * last.std() * torch.randn(last.shape, generator=torch.Generator().manual_seed(0))
    return root, gb.audit(trained, digits, QUICK, root / "a"), gb.audit(worse, digits, QUICK, root / "b"), worse


def test_an_audit_keeps_the_outcomes_that_its_rates_were_computed_from(audited, trained, digits):
    root, first, second, worse = audited
    for name, rate in comparison._rates(first.results).items():
        rows, counts = first.outcomes.of(name)
        share = counts.error_rate if name.startswith("uer") else counts.accuracy
        assert share == rate, name
        assert len(rows) == rate.n
    found = gb.compare(root / "a", root / "b")
    assert {one.unpaired for one in found.changes} == {""}
    assert [one.first for one in found.changes] == list(comparison._rates(first.results).values())
    assert found == gb.compare(first, second) == gb.compare(root / "a", second)
    assert sum(one.lost + one.gained for one in found.changes) > 0
    same = gb.compare(first, root / "a")
    assert not same.regressions
    assert {(one.lost, one.gained) for one in same.changes} == {(0, 0)}
    for name, folder in (("first", "a"), ("second", "b")):  # audits that were interrupted before their last step
        shutil.copytree(root / folder, root / "m" / name)
        (root / "m" / name / "result.json").unlink()
    again = gb.compare(trained, worse, digits, suite=QUICK, out=root / "m")
    assert (again.changes, again.first.label, again.second.label) == (found.changes, "first", "second")
    text = repr(found)
    assert all(f"{change.name} " in text for change in found.changes)
    assert "<table>" in found._repr_html_()
    assert list(found.to_frame()["lost"]) == [one.lost for one in found.changes]


def test_outcomes_outlive_an_interruption(audited, trained, digits, tmp_path):
    root, first, *_ = audited
    shutil.copytree(root / "a", tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    again = gb.audit(trained, digits, QUICK, tmp_path / "a")  # every stage is read, none is measured
    assert (tmp_path / "a" / Outcomes.FILE).read_bytes() == (root / "a" / Outcomes.FILE).read_bytes()
    assert gb.compare(again, first).changes[0].unpaired == ""
