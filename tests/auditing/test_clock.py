"""Audits against the clock: what is chosen for a time, that it ends in time, and what is said of the rest."""

import io
import json
import re
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, PGD
from gambeson.auditing import DIAGNOSTICS, SUITES, Suite, clock
from gambeson.auditing.amounts import CHECKS
from gambeson.auditing.auditor import Auditor
from gambeson.auditing.clock import Clock
from gambeson.auditing.cost import Speed, parts_of
from gambeson.auditing.results import AuditResult
from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.adaptive import OnStandIn
from gambeson.auditing.stages.transfer import FromSurrogate
from gambeson.base import show_progress
from gambeson.cli.app import run
from gambeson.evaluation import FunctionModel
from gambeson.victim import Victim
from gambeson.victim.substitute import InnerGradientsOff
from tests.conftest import full

LITTLE = Suite(
    eps=(0.1, 0.2, 0.3), universal_steps=20, universal_restarts=1, universal_batch=16, universal_probe_starts=0,
    pgd_steps=5, pgd_restarts=1, test_images=120, validation_images=60, sample=40, suite_images=0, queries=20,
    jacobian_backwards=200,
    universal_queries=300, surrogate="none", eps_uni_runs=1, noise_sizes=(1.0,), eps_adv=False, auto_pgd=False,
)  # fmt: skip


class Time:
    """A clock that goes on as images are sent through a model, and by nothing else."""

    def __init__(self, monkeypatch, each=1e-3):
        self.now, self.each, self.images = 0.0, each, 0
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        speed = Speed(forward=each, gradient=each, surrogate=each)
        monkeypatch.setattr(clock, "measured", lambda *_: speed)

    def spend(self, images):
        self.images += images
        self.now += images * self.each


class Slow(nn.Module):
    """A model whose every image takes time, and more after so many images."""

    def __init__(self, model, time_, slower=1.0, after=0, stop=None):
        super().__init__()
        self.model, self.slower, self.after, self.stop = model, slower, after, stop
        self.time = [time_]  # not copied: the fast path copies models

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        now = self.time[0]
        now.spend(len(x) * (self.slower if now.images >= self.after else 1.0))
        if self.stop is not None and now.images > self.stop:
            raise KeyboardInterrupt
        return self.model(x)


def test_every_check_has_its_cost():
    assert set(CHECKS) == {diagnostic.name for diagnostic in DIAGNOSTICS}
    assert set(SUITES["glance"].checks) < set(CHECKS)


def test_more_time_buys_more_and_less_is_given_up_in_order(digits, trained, monkeypatch):
    now = Time(monkeypatch)
    asked, chosen = SUITES["full"].on(digits), []
    for minutes in (0.2, 1, 4, 15, 60, 240, 1e6):
        one = Clock(minutes, trained, digits, SUITES["full"])
        suite = one.choose()
        assert one.seconds(suite) <= 0.9 * 60 * minutes
        assert one.seconds(suite) > 0.7 * 60 * minutes or suite.test_images is None
        chosen.append(suite)
    assert now.images == 0
    assert chosen[-1] == asked.model_copy(update={"middle_first": True})
    assert all(suite.jacobian_backwards == 0 or suite.jacobian_backwards >= 500 for suite in chosen)
    for name in ("pgd_steps", "sample"):
        amounts = [getattr(suite, name) for suite in chosen]
        assert amounts == sorted(amounts), name
    lengths = [len(CHECKS) if suite.checks == "all" else len(suite.checks) for suite in chosen]
    assert lengths == sorted(lengths)
    assert lengths[0] < len(CHECKS)
    middle = asked.eps[len(asked.eps) // 2]
    assert all(suite.eps[len(suite.eps) // 2] == middle for suite in chosen)
    assert len(chosen[0].eps) == 1
    assert chosen[1].jacobian_backwards == 0 < chosen[-2].universal_restarts


def test_choosing_again_looks_at_few_suites(digits, trained, monkeypatch):
    Time(monkeypatch)
    looked = []
    monkeypatch.setattr(
        clock, "parts_of", lambda suite, *rest, **more: looked.append(suite) or parts_of(suite, *rest, **more)
    )
    for minutes, most in ((30, 2), (30_000, 5)):  # just enough, and more than enough
        now = Clock(minutes, trained, digits, SUITES["full"])
        suite = now.choose()
        assert len(looked) < 200
        looked.clear()
        now.begin(suite, "surrogate")
        assert 1 <= len(looked) <= most  # before every stage and check
        looked.clear()


def test_too_few_minutes_are_refused_with_the_least(digits, trained, monkeypatch):
    Time(monkeypatch)
    with pytest.raises(UserError, match=r"0.01 minutes is too short: the smallest .* --minutes [\d.]+$") as error:
        Clock(0.01, trained, digits, SUITES["quick"]).choose()
    least = float(re.search(r"--minutes ([\d.]+)$", str(error.value))[1])
    assert len(Clock(least, trained, digits, SUITES["quick"]).choose().eps) == 1
    with pytest.raises(UserError, match="too short"):
        Clock(0.8 * least, trained, digits, SUITES["quick"]).choose()
    with pytest.raises(UserError, match="or fewer --eps"):
        Clock(least, trained, digits, SUITES["quick"].model_copy(update={"eps": (0.1, 0.2, 0.3, 0.4)})).choose()
    with pytest.raises(UserError, match="minutes = 0: expected greater than 0"):
        gb.audit(trained, digits, "quick", minutes=0)
    with pytest.raises(UserError, match="nan is not a finite number"):
        gb.audit(trained, digits, "quick", minutes=float("nan"))


@pytest.mark.parametrize(("slower", "minutes"), [full(1.0, 0.3), full(1.0, 1.0), (2.5, 0.5)])
def test_an_audit_ends_in_time_also_on_a_machine_that_slows_down(digits, trained, monkeypatch, slower, minutes):
    now = Time(monkeypatch)
    model = Slow(trained, now, slower, after=3000)
    result = gb.audit(model, digits, LITTLE, minutes=minutes).results
    assert now.now <= 1.02 * 60 * minutes
    assert now.now > 0.5 * 60 * minutes or result.settings["eps_uni_runs"] == 1
    assert result.minutes == minutes
    assert result.settings["minutes"] is None
    assert result.middle.eps == 0.2  # whatever is left of the curve
    if (text := result.verdict.summary).startswith(f"The {minutes:g} minute"):
        assert not result.verdict.trusted or "checks" not in text.split(".")[1]
    ran = [check.name for check in result.checks if check.detail != "it was left out"]
    assert result.settings["checks"] == "all" or set(result.settings["checks"]) <= set(ran)


def test_training_a_surrogate_stops_where_it_takes_longer_than_planned(digits, trained, monkeypatch):
    now, create = Time(monkeypatch), gb.models.create

    def slow(name, data):
        net = create(name, data)
        net.register_forward_hook(lambda module, inputs, logits: now.spend(20 * len(logits)))
        return net

    monkeypatch.setattr(gb.models, "create", slow)
    monkeypatch.setattr(surrogate, "_FEWEST_STEPS", 40)
    little = {"surrogate": "auto", "surrogate_images": 400, "surrogate_epochs": 2, "checks": ("stateless",)}
    none = {
        "jacobian_backwards": 0,
        "universal_queries": 300,
        "rescoring": False,
        "queries": 0,
        "eps_uni_runs": 0,
        "noise_sizes": (),
        "edits": (),
    }
    suite = LITTLE.model_copy(update={"eps": (0.2,), **little, **none})
    result = gb.audit(Slow(trained, now), digits, suite, minutes=0.3).results
    assert now.now <= 1.02 * 18
    assert result.surrogate.left_out == "No perturbation was transferred: training the surrogate took too long."
    assert any(note.startswith("surrogate was left out: the 0.3 minutes of") for note in result.notes)
    assert (result.settings["surrogate"], result.transfer) == ("none", [])
    assert result.middle.uer.n == result.material.test


def test_attacks_on_stand_ins_and_surrogates_stop_with_the_time(digits, trained):
    class Over(Exception):
        pass

    def over():
        raise Over

    x, y = digits.test.take(slice(0, 4))
    attacks = [OnStandIn(InnerGradientsOff, PGD(eps=0.1, steps=2)), FromSurrogate(trained, FGSM(eps=0.1))]
    with Victim(trained) as victim:
        for attack in attacks:
            attack(victim, x, y)
        victim.before_call = over
        for attack in attacks:
            with pytest.raises(Over):
                attack(victim, x, y)


@pytest.mark.full
def test_what_was_chosen_can_be_run_again_without_the_clock(digits, trained, monkeypatch):
    now = Time(monkeypatch)
    first = gb.audit(Slow(trained, now), digits, LITTLE, minutes=0.5).results
    assert first.settings != LITTLE.plain()
    again = gb.audit(trained, digits, Suite(**first.settings)).results
    same = ("settings", "clean", "universal", "per_image", "eps_uni", "corruption")
    for name in same:
        assert getattr(first, name) == getattr(again, name), name
    passed = {check.name: check.passed for check in first.checks}
    assert passed == {check.name: check.passed for check in again.checks}


@pytest.mark.full
def test_an_audit_against_the_clock_goes_on_where_it_stopped(digits, trained, monkeypatch, tmp_path):
    now = Time(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        gb.audit(Slow(trained, now, stop=11_000), digits, LITTLE, tmp_path, minutes=0.5)
    stored = json.loads((tmp_path / "state" / "stages.json").read_text())
    assert "uap-0.2.safetensors" in stored
    before, spent = now.now, stored["clock"]["spent"]
    taken = []
    monkeypatch.setattr(Auditor, "_take", _listening(Auditor._take, taken))
    result = gb.audit(Slow(trained, now), digits, LITTLE, tmp_path, minutes=0.5).results
    assert dict(taken)["uap-0.2.safetensors"] == 0  # asked of the model
    assert spent + now.now - before <= 1.02 * 30
    chosen = stored["clock"]["suite"]
    assert (result.material.test, result.settings["universal_steps"]) == (
        chosen["test_images"], chosen["universal_steps"],
    )  # fmt: skip
    whole = (tmp_path / "result.json").read_bytes()
    again = gb.audit(Slow(trained, now, slower=3, after=0), digits, LITTLE, tmp_path, minutes=0.5)
    assert again.results == result  # a finished one is not measured again in another time
    assert len(again.perturbations) == len(result.universal)
    assert (tmp_path / "result.json").read_bytes() == whole
    with pytest.raises(UserError, match="holds another run"):
        gb.audit(gb.models.create("lenet5", digits), digits, LITTLE, tmp_path, minutes=0.5)


def _listening(take, taken):
    def listen(self, stage, *, known):
        before = self.context.victim.forwards
        line = take(self, stage, known=known)
        taken.append((stage.name, self.context.victim.forwards - before))
        return line

    return listen


def test_a_black_box_has_a_clock_too(digits, trained, monkeypatch):
    now = Time(monkeypatch)
    model = Slow(trained, now)
    suite = SUITES["quick"].model_copy(update={"surrogate": "none"})
    result = gb.audit(FunctionModel(model), digits, suite, minutes=0.5).results
    assert now.now <= 1.02 * 30
    assert result.settings["patterns"] < suite.patterns
    assert any(note.startswith("The 0.5 minutes made the audit smaller: ") for note in result.notes)


def test_the_time_that_is_left_out_widens_the_interval(digits, trained, monkeypatch):
    now = Time(monkeypatch)
    result = gb.audit(Slow(trained, now), digits, SUITES["glance"], minutes=0.1).results
    note = next(note for note in result.notes if note.startswith("On "))
    seen, every, wide, narrow = re.search(
        r"On (\d+) of (\d+) test images .* is ± ([\d.]+) points; on all of them it would be ± ([\d.]+)\.", note
    ).groups()
    rate = result.middle.uer
    assert (int(seen), int(every)) == (rate.n, 200)
    assert float(wide) == pytest.approx(50 * (rate.high - rate.low), abs=0.06)
    assert float(narrow) < float(wide) * (int(seen) / 200) ** 0.4


def test_a_glance_does_not_claim_what_it_has_not_checked(digits, trained):
    verdict = (found := gb.audit(trained, digits, "glance")).verdict
    result = found.results
    assert not verdict.trusted
    assert verdict.summary.startswith("Not checked for ")
    ran = len(SUITES["glance"].checks)
    idle = sum(check.passed is None for check in result.checks if check.name in SUITES["glance"].checks)
    assert f"{ran - idle} of {len(CHECKS)} checks were run, none failed and {idle} did not apply." in verdict.summary
    assert "white box beats queries" in verdict.unchecked
    assert len(result.universal) == 1
    assert result.universal[0].controls
    assert [one.attack for one in result.per_image] == ["pgd"]
    left = {check.name for check in result.checks if check.detail == "it was left out"}
    assert left == set(CHECKS) - set(SUITES["glance"].checks)
    assert "not all checked" in repr(result)
    with pytest.raises(UserError, match="unknown check 'no vanishing gradient': did you mean"):
        gb.audit(trained, digits, Suite(checks=("no vanishing gradient",)))


def test_a_glance_fits_small_and_large_nets(monkeypatch):
    """By counts: 3.5 and 9 ms per image forward and gradient, and 0.2 and 0.45 s, in a minute and in ten."""
    small = _images(3, 32, 3000)
    speed = Speed(forward=0.0035, gradient=0.009)
    assert sum(speed.seconds(part) for part in parts_of(SUITES["glance"].on(small), small)) < 60
    large = _images(3, 224, 300)
    Time(monkeypatch)
    monkeypatch.setattr(clock, "measured", lambda *_: Speed(forward=0.2, gradient=0.45))
    one = Clock(SUITES["glance"].minutes, nn.Identity(), large, SUITES["glance"])
    suite = one.choose()
    assert one.seconds(suite) < 540
    assert suite.test_images >= 32
    assert len(suite.checks) >= 6


def _images(channels, side, count):
    return gb.data.as_dataset((torch.rand(count, channels, side, side), torch.arange(count) % 10))


def test_the_first_answer_comes_first_and_changes_nothing(digits, trained, monkeypatch):
    suite = LITTLE.model_copy(update={"jacobian_backwards": 0, "checks": ("stateless",), "rescoring": False})
    silent = gb.audit(trained, digits, suite).results
    text = io.StringIO()
    monkeypatch.setattr("gambeson.auditing.auditor._MINUTE", 0.0)
    with show_progress(Console(file=text, width=300)):
        watched = gb.audit(trained, digits, suite).results
    assert watched == silent
    lines = text.getvalue().splitlines()
    assert re.match(r"first answer: UER .* % \[.*\] at eps 0.2 on \d+ test images after \d+ steps, against", lines[0])
    assert lines[1].startswith("eps 0.1: UER ")
    assert any(line.startswith("per image: accuracy ") for line in lines)
    shares = [int(found[1]) for line in lines if (found := re.match(r"audit model: (\d+) of 100", line))]
    assert shares == sorted(shares)
    assert shares[-1] == 100


@pytest.mark.full
def test_three_tenths_of_a_minute(trained, tmp_path, capsys):
    weights, out = str(tmp_path / "net.safetensors"), tmp_path / "out"
    gb.models.save(trained, tmp_path / "net.safetensors")
    asked = ["audit", weights, "--data", "digits", "--minutes", "0.3", "--out", str(out)]
    assert run([*asked, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] < 18
    assert not out.exists()
    taken = []
    for turn in range(3):  # a machine with other work may be too slow once
        began = time.monotonic()
        assert run([*asked[:-1], str(out.with_name(str(turn))), "--json"]) == 0
        taken.append(time.monotonic() - began)
        if taken[-1] < 1.1 * 18:
            break
        capsys.readouterr()
    assert min(taken) < 1.1 * 18
    assert json.loads(capsys.readouterr().out)["minutes"] == 0.3
    assert AuditResult.load(out.with_name(str(turn))).middle.eps == 0.15
    assert run(["audit", weights, "--data", "digits", "--minutes", "-1"]) == 2
    assert "--minutes -1.0: expected greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "checks"),
    [
        full("adaptive.measure", {"gradient complete", "no optimisation at test time"}),
        ("universal.craft_by_queries", {"universal white box beats queries"}),
        ("surrogate.obtain", {"white box beats transfer", "universal white box beats transfer"}),
    ],
)
def test_a_check_whose_stage_was_stopped_was_not_run(stage, checks, digits, trained, monkeypatch):
    def over(*_):
        raise clock.TimeSpent("the minutes of the audit are over")

    monkeypatch.setattr(f"gambeson.auditing.stages.{stage}", over)
    suite = LITTLE.model_copy(update={"surrogate": "auto", "checks": tuple(sorted(checks)), "edits": ()})
    audit = gb.audit(trained, digits, suite)
    found = {check.name: check.outcome for check in audit.results.checks if check.name in checks}
    assert found == dict.fromkeys(checks, "not run")
    assert not audit.verdict.trusted
    assert not audit.results.gate(f"check:{min(checks)}").held


def test_checks_of_what_the_time_left_out_were_not_run(digits, trained, monkeypatch):
    now = Time(monkeypatch)
    asked = {"white box beats transfer", "white box beats queries", "universal white box beats queries"}
    suite = LITTLE.model_copy(update={"surrogate": "auto", "universal_queries": 30_000, "checks": tuple(sorted(asked))})
    monkeypatch.setattr(clock, "fit", lambda suite, *_, **__: (
        suite.model_copy(update={"surrogate": "none", "universal_queries": 0}), True))  # fmt: skip
    audit = gb.audit(Slow(trained, now), digits, suite, minutes=5)
    found = {check.name: check.outcome for check in audit.results.checks if check.name in asked}
    assert found == {**dict.fromkeys(asked, "not run"), "white box beats queries": "passed"}
    assert not audit.verdict.trusted
    left = gb.audit(trained, digits, suite.model_copy(update={"surrogate": "none", "universal_queries": 0})).results
    assert {c.outcome for c in left.checks if c.name in asked} == {"passed", "does not apply"}  # nobody asked for them
