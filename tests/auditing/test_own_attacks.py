"""Attacks of the user's own in an audit, and what results show in a notebook."""

import sys

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.auditing import SUITES, plot_audits
from gambeson.auditing.audit import audit
from gambeson.auditing.cost import Speed, plan

SMALL = SUITES["quick"].model_copy(
    update={
        "eps": (0.05, 0.1, 0.2),
        "universal_steps": 20,
        "test_images": 120,
        "sample": 40,
        "jacobian_backwards": 0,
        "universal_queries": 300,
        "edits": (),
        "checks": ("stateless", "no vanishing gradients", "monotone in eps"),
        "surrogate": "none",
        "eps_uni_runs": 0,
        "eps_adv": False,
        "queries": 0,
    }
)
WEAK = """
import torch
from gambeson.base import Config
from gambeson.threat import Eps

class Corner(Config):
    eps: Eps

    def __call__(self, model, x, y, *, seed=0, task=None):
        raise RuntimeError("no corner")
"""


class Invert(gb.base.Config):
    """Moves every pixel by eps towards its opposite."""

    eps: float = 0.1

    def __call__(self, model, x, y, *, seed=0, task=None):
        return (x + self.eps * torch.where(x < 0.5, 1.0, -1.0)).clamp(0, 1)


def towards_grey(model, x, y, *, seed=0, task=None):
    return x + (0.5 - x).clamp(-0.1, 0.1)


@pytest.fixture(scope="module")
def found(trained, digits):
    mine = [Invert(), towards_grey, gb.attacks.StochasticPGD(eps=0.1, steps=200, restarts=2)]
    return audit(trained, digits, SMALL, attacks=mine)


def test_own_attacks_are_scored_as_the_suites_are(found, trained, digits):
    results = {one.attack: one for one in found.results.per_image}
    assert list(results) == ["pgd", "auto-pgd-targeted", "Invert", "towards_grey"]
    test = digits.test.sample(120, seed=0)
    x, y = test.take(slice(None))
    for name, attack in (("Invert", Invert()), ("towards_grey", towards_grey)):
        with torch.no_grad():
            right = float((trained(attack(None, x, y)).argmax(1) == y).float().mean())
        assert results[name].accuracy.value == pytest.approx(right, abs=1e-6)
        assert results[name].eps == 0.1
    (moved,) = found.results.transfer
    assert (moved.source, moved.universal, moved.eps) == ("stochastic-pgd", True, 0.1)
    assert moved.error.value > found.results.clean.complement.value + 0.05
    assert "stochastic-pgd" in found.verdict.summary or moved.error.value < found.results.middle.uer.high


@pytest.mark.parametrize(
    ("attacks", "words"),
    [
        ([Invert], "Invert is a class: give an attack made from it"),
        ([3], "3 is no attack"),
        ([lambda model, x: x], "expected a function of"),
        ([Invert(), Invert()], "given twice"),
    ],
)
def test_what_is_no_attack_is_refused_before_a_forward(digits, attacks, words):
    class Never(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("asked")

    with pytest.raises(UserError, match=words):
        audit(Never(), digits, SMALL, attacks=attacks)


def test_an_attack_of_a_file_is_blamed_with_its_line(trained, digits, tmp_path):
    (tmp_path / "mine.py").write_text(WEAK)
    suite = SMALL.model_copy(update={"attacks": (f"{tmp_path}/mine.py:Corner",)})
    with pytest.raises(UserError, match=r"Corner.* failed in line 10 of .*mine.py \(RuntimeError: no corner\)"):
        audit(trained, digits, suite)


def test_a_notebook_shows_ten_lines_and_figures(found, monkeypatch):
    text, results = repr(found), found.results
    assert len(text.splitlines()) <= 10
    assert str(results.clean) in text
    assert str(results.middle.uer) in text
    assert found.verdict.summary in text
    assert str(results) == repr(results)
    assert "<script" not in found._repr_html_()
    assert str(results.middle.uer) in found._repr_html_()
    assert list(found.plot().data[0].y) == [100 * point.uer.value for point in results.universal]
    both = plot_audits([found, results])
    assert [line.name for line in both.data][:2] == ["model", "model, strongest control"]
    three = plot_audits([found, results, results])
    assert [line.name for line in three.data][::2] == ["model", "model (2)", "model (3)"]
    frame = found.to_frame()
    row = frame[(frame["what"] == "UER") & (frame["eps"] == 0.1)].iloc[0]
    assert row["value"] == results.middle.uer.value
    uap = found.perturbations[1]
    assert "stochastic-pgd, eps 0.1, norm inf, 1x8x8" in repr(uap)
    grey = uap.plot().data[0].z
    assert (grey.min(), grey.max()) == (0, 1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        found.to_frame()


def test_a_data_set_shows_its_splits_and_some_classes(digits):
    assert repr(digits) == (
        "Dataset(digits: train 1,078, validation 270, test 449 images of 1x8x8, 10 classes: 0, 1, 2, 3, 4, ...)"
    )


def test_own_attacks_are_part_of_the_plan(trained, digits, tmp_path):
    (tmp_path / "mine.py").write_text(WEAK)
    named = SMALL.model_copy(update={"attacks": ("square", f"{tmp_path}/mine.py:Corner")})
    universal = gb.attacks.StochasticPGD(eps=0.1, steps=50, restarts=3, batch_size=20, probe_starts=2)
    searched = gb.attacks.CarliniWagner(steps=40, searches=5)
    mine = [gb.attacks.PGD(eps=0.2, steps=30, restarts=4), universal, searched]
    speed = Speed(forward=1e-3, gradient=2e-3)

    def own_part(suite, attacks=()):
        parts = plan(trained, digits, suite, speed=speed, attacks=attacks).parts
        return {part.name: part for part in parts}["own attacks"]

    assert own_part(SMALL).forwards == own_part(SMALL).gradients == 0
    assert own_part(SMALL, mine).gradients == 120 * 30 * 4 + (50 * 3 * 20 + 2 * 100 * 16) + 120 * 40 * 5
    assert own_part(SMALL, mine[:1]).forwards >= 120
    both = own_part(named)
    assert (both.gradients, both.forwards >= 120 * 5000) == (120 * 100, True)  # of unknown length, and by queries


def test_an_own_attack_costs_no_more_than_planned(found, trained, digits):
    mine = [gb.attacks.StochasticPGD(eps=0.1, steps=200, restarts=2)]
    parts = plan(trained, digits, SMALL, speed=Speed(forward=1e-3, gradient=2e-3), attacks=mine).parts
    part = {part.name: part for part in parts}["own attacks"]
    (moved,) = found.results.transfer
    assert 0 < moved.cost.backwards <= part.gradients
    assert moved.cost.forwards - moved.cost.backwards <= part.forwards


class Shift:
    """An attack that does not tell its settings."""

    def __init__(self, by):
        self.by, self.calls = by, 0

    def __call__(self, model, x, y, *, seed=0, task=None):
        self.calls += 1
        return (x + self.by * (0.5 - x).sign()).clamp(0, 1)


def test_a_stored_result_of_an_attack_without_settings_is_not_taken_for_one_of_another(
    trained, digits, tmp_path, monkeypatch
):
    suite = SMALL.model_copy(update={"eps": (0.3,), "suite_images": 0, "auto_pgd": False, "rescoring": False})

    def accuracies(*mine):
        found = audit(trained, digits, suite, tmp_path, attacks=mine).results.per_image
        return {one.attack: one.accuracy.value for one in found}

    known = Invert()
    first, second = accuracies(Shift(0.0), known), accuracies(Shift(0.3), known)
    assert second["Shift"] == audit(trained, digits, suite, attacks=[Shift(0.3)]).results.per_image[-1].accuracy.value
    assert second["Shift"] < first["Shift"]
    again = Shift(0.3)
    assert accuracies(again, known) == second
    assert again.calls

    def never(self, model, x, y, *, seed=0, task=None):
        raise AssertionError

    monkeypatch.setattr(Invert, "__call__", never)  # whose settings are known, and whose result is stored
    assert accuracies(again, known) == second
