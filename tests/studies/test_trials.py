"""Searches by trials: they learn from scores, start from the settings as they are, and go on where they were cut."""

import json
import math
import sys

import pytest

import gambeson as gb
from gambeson.base import UserError
from gambeson.data import load as load_dataset
from gambeson.defenses import create
from gambeson.studies import Matrix, run_study, trainings
from gambeson.studies.trials import Range, propose
from gambeson.training import Recipe, TrainRun
from gambeson.training.loop import DivergedError
from tests.studies.test_study import tiny

pytest.importorskip("optuna")
SPACE = {"x": Range(low=1e-4, high=1.0, log=True), "kind": ("a", "b", None), "count": Range(low=1, high=9, whole=True)}


def score(params):
    """Best at x = 0.01, b and 7."""
    return 1 - abs(math.log10(params["x"]) + 2) / 4 - 0.3 * (params["kind"] != "b") - abs(params["count"] - 7) / 20


def searched(count, now, seed=0):
    done = []
    for _ in range(count):
        params = propose(SPACE, now, done, seed)
        done.append((params, score(params)))
    return done


def test_later_trials_are_better_than_early_ones():
    gains = []
    for seed in range(3):
        done = [value for _, value in searched(60, {}, seed)]
        gains.append(sum(done[-20:]) / 20 - sum(done[:10]) / 10)  # the first ten are drawn
    assert min(gains) > 0.1


def test_a_proposal_follows_from_the_trials_and_the_seed_alone():
    done = searched(14, {})
    assert propose(SPACE, {}, done[:13], 0) == done[13][0]
    assert propose(SPACE, {}, done[:13], 1) != done[13][0]
    for params, _ in done:
        assert 1e-4 <= params["x"] <= 1
        assert params["kind"] in SPACE["kind"]
        assert params["count"] in range(1, 10)


@pytest.mark.parametrize("outside", [{"x": 2.0}, {"kind": "c"}, {"count": 0}])
def test_the_first_trial_is_of_the_settings_as_they_are_if_they_are_in_the_space(outside):
    now = {"x": 0.5, "kind": None, "count": 3}
    assert propose(SPACE, now, [], 0) == now
    assert propose(SPACE, now | outside, [], 0) != now | outside


PART = {"share": 0.5, "per_image": True}
FEW = {
    "seeds": [0],
    "recipe": {"epochs": 2, "batch_size": 16, "optimizer": "adam", "lr": 0.01},
    "measures": {"clean": {"kind": "accuracy"}},
    "search": {"lr": {"low": 1e-4, "high": 0.1, "log": True}, "trials": 3, "space": {"ema": [None, 0.9]}} | PART,
}
HEAPS = {"name": "shared-adversarial", "settings": {"sharedness": 8}}
CLAIM = {"statement": "x", "metric": "clean.accuracy", "of": "heaps", "to": "standard", "at_least": 0}
SPACE_OF_HEAPS = {"sharedness": [4, 8], "sigma": {"low": 0.2, "high": 0.8}}
SEARCHED = {**FEW, "defenses": {"heaps": {**HEAPS, "space": SPACE_OF_HEAPS}}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study with a search by trials, and its folder."""
    root = tmp_path_factory.mktemp("studies")
    return run_study(tiny(**SEARCHED), root), root


def test_a_study_trains_what_its_trials_chose(done):
    result, root = done
    (search,) = result.searches
    assert len(search["tried"]) == 3
    first = search["tried"][0]
    assert (first["lr"], first["recipe"], first["epochs"]) == (0.01, {"ema": None}, 1)  # as it is: 0.01 in the recipe
    assert first["settings"]["sharedness"] == 8
    best = max(search["tried"], key=lambda one: one["accuracy"] - one["uer"] + one["attacked"])
    assert all(search[name] == best[name] for name in ("lr", "warmup", "recipe", "settings"))
    row = result.rows[0]
    assert (row.recipe["lr"], row.recipe["ema"]) == (search["lr"], search["recipe"]["ema"])
    text = next(root.glob("cells/*/run/run.yaml")).read_text()
    assert f"sigma: {search['settings']['sigma']}" in text
    assert f"sharedness: {search['settings']['sharedness']}" in text


def test_a_search_that_was_cut_tries_the_same(done, tmp_path, monkeypatch):
    result, _ = done
    real, calls = trainings._trained, []

    def cut(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "_trained", cut)
        with pytest.raises(KeyboardInterrupt):
            run_study(tiny(**SEARCHED), tmp_path)
    again = run_study(tiny(**SEARCHED), tmp_path)
    assert json.dumps(again.searches) == json.dumps(result.searches)


def test_a_training_that_diverges_at_the_rate_of_its_search_has_half_of_it(tmp_path, monkeypatch):
    real, rates = trainings.run_training, []

    def limited(run, out, data):
        rates.append(run.recipe.lr)
        if run.recipe.lr > 0.003:
            raise DivergedError("the loss became NaN")
        model = real(run, out, data)
        if rates.count(0.002) == 1:
            raise KeyboardInterrupt
        return model

    monkeypatch.setattr(trainings, "run_training", limited)
    data = load_dataset("digits")
    recipe = Recipe(epochs=4, batch_size=16, optimizer="adam", lr=0.5)
    run = TrainRun(data="digits", model="lenet5", defense=create("standard"), recipe=recipe)
    searched = {"lr": 0.008, "warmup": 0, "recipe": {}, "settings": {}}
    with pytest.raises(KeyboardInterrupt):
        trainings.train(run, data, 0.1, tmp_path / "run", searched=searched)
    found = trainings.train(run, data, 0.1, tmp_path / "run", searched=searched)
    assert rates == [0.008, 0.004, 0.002, 0.002]  # what was begun is gone on with
    assert found["recipe"]["lr"] == 0.002
    assert found["values"]["validation_accuracy"] > 0.8
    with pytest.raises(DivergedError):
        trainings.train(run, data, 0.1, tmp_path / "other", searched=searched | {"lr": 0.02})
    with pytest.raises(DivergedError):  # as the study gives it
        trainings.train(TrainRun(**run.plain()), data, 0.1, tmp_path / "given")


@pytest.mark.filterwarnings("ignore:the model has not learnt")
def test_a_training_that_learns_nothing_at_the_rate_of_its_search_has_half_of_it(tmp_path, monkeypatch):
    real, rates = trainings.run_training, []

    def noted(run, out, data):
        rates.append(run.recipe.lr)
        return real(run, out, data)

    monkeypatch.setattr(trainings, "run_training", noted)
    data, recipe = load_dataset("digits"), Recipe(epochs=1, optimizer="adam")
    run = TrainRun(data="digits", model="lenet5", defense=create("standard"), recipe=recipe)
    searched = {"lr": 8.0, "warmup": 0, "recipe": {}, "settings": {}}
    found = trainings.train(run, data, 0.1, tmp_path / "run", searched=searched)
    assert rates == [8.0, 4.0, 2.0]
    assert (found["recipe"]["lr"], found["values"]["learnt"]) == (2.0, 0.0)


@pytest.mark.parametrize("high", [1e12, 1e30])
def test_a_candidate_whose_last_step_breaks_it_is_as_bad_as_can_be(tmp_path, high):
    data = load_dataset("digits")
    few = gb.data.Dataset("digits", data.train.sample(140), data.validation.sample(60), data.test, data.classes)
    run = TrainRun(data="digits", model="lenet5", defense=create("standard"), recipe=Recipe(epochs=2))
    asked = {"lr": [0.05, high], "warmup": [0.0], "share": 1.0, "per_image": False}
    found = trainings.search(run, few, 0.1, asked, tmp_path / "search")
    assert found["lr"] == 0.05
    assert [one["accuracy"] is None for one in found["tried"]] == [False, True]


def test_at_equal_time_a_step_costs_what_the_trials_chose():
    study = {
        **SEARCHED,
        "seeds": 2,
        "defenses": {**SEARCHED["defenses"], "standard": "standard"},
        "claims": {"C": CLAIM},
    }
    cells = Matrix(tiny(**study, at=["seconds"], reference="standard")).cells
    kinds = {cell.row.defense: [need.kind for need in cell.needs] for cell in cells if cell.kind == "cost"}
    assert kinds == {"heaps": ["search"], "standard": []}


@pytest.mark.parametrize(
    ("search", "defense", "words"),
    [
        ({"lr": [0.1], "space": {"ema": [0.9]}}, {}, "for trials: give their number"),
        ({"lr": {"low": 0.1, "high": 0.2}}, {}, "for trials: give their number"),
        ({"lr": {"low": 0.2, "high": 0.1}, "trials": 2}, {}, "expected low below high"),
        ({"lr": {"low": 0, "high": 0.1, "log": True}, "trials": 2}, {}, "log needs positive numbers"),
        ({"lr": [0.1], "trials": 2, "space": {"epochs": [1, 2]}}, {}, "epochs is not of the space"),
        ({"lr": [0.1]}, {"space": {"sigma": [0.3]}}, "give search.trials"),
        (
            {"lr": [0.1], "trials": 2},
            {"space": {"sigma": [0.3]}, "grid": {"sigma": [0.3]}},
            "sigma of heaps is in its grid",
        ),
        ({"lr": [0.1], "trials": 2, "space": {"emma": [0.9]}}, {}, "did you mean ema"),
        ({"lr": [0.1], "trials": 2}, {"space": {"sigma": [0.3, -1]}}, "sigma"),
        ({"lr": [0.1], "trials": 2}, {"space": {"sigmma": [0.3]}}, "did you mean sigma"),
    ],
)
def test_a_wrong_space_is_one_sentence(search, defense, words):
    study = {**FEW, "search": search, "defenses": {"heaps": {**HEAPS, **defense}}}
    with pytest.raises(UserError, match=words):
        assert Matrix(tiny(**study)).cells


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[search\]'"):
        propose(SPACE, {}, [], 0)
