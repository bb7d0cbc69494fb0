"""What is missed, who is accused, and what a folder keeps."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gambeson as gb
from gambeson.cli.app import run
from gambeson.evaluation import Rate
from gambeson.testbed import Judgement, broken
from gambeson.testbed.judgement import as_judgement
from gambeson.testbed.library import listing

FEW = ["four grey levels", "logits x 1e4", "repeated queries: constant", "standard", "linear"]


def test_an_auditor_that_trusts_everything_misses_all():
    found = gb.testbed.score(lambda model, data: True, models=FEW)
    assert (found.missed.value, found.missed.n) == (1, 3)
    assert (found.accused.value, found.accused.n) == (0, 2)
    assert found.missed == Rate.of(3, 3)
    assert {kind: rate.n for kind, rate in found.by_kind.items()} == {
        "preprocessing": 1,
        "logits": 1,
        "state": 1,
        "honest": 2,
    }


def test_an_auditor_that_distrusts_everything_accuses_all():
    found = gb.testbed.score(lambda model, data: SimpleNamespace(trusted=False), models=FEW)
    assert found.missed == Rate.of(0, 3)
    assert found.accused == Rate.of(2, 2)
    assert [outcome.name for outcome in found.wrong()] == ["standard", "linear"]


def test_pgd_alone_misses_masked_gradients_and_accuses_nobody():
    found = gb.testbed.score("pgd", models=["four grey levels", "logits x 1e4", "final ReLU", "standard"])
    wrong = {outcome.name: outcome.wrong for outcome in found.outcomes}
    assert wrong == {"four grey levels": "missed", "logits x 1e4": "missed", "final ReLU": "", "standard": ""}
    by_name = {outcome.name: outcome for outcome in found.outcomes}
    assert by_name["four grey levels"].judgement.accuracy.value > 0.8
    assert by_name["final ReLU"].broken == {"per image": True}  # it hides little, and PGD finds as much as underneath
    assert by_name["standard"].judgement.accuracy.value < 0.2


def test_a_detector_that_sees_one_kind():
    def detector(model, data):
        """Logits that are too large."""
        return bool(model(data.test.take(slice(0, 10))[0]).abs().max() < 1e3)

    found = gb.testbed.score(detector, models=FEW)
    assert [outcome.name for outcome in found.wrong()] == ["four grey levels", "repeated queries: constant"]
    assert found.by_kind["logits"].value == 0


def test_a_refusal_is_distrust_and_a_bug_is_a_bug():
    def refuses(model, data):
        raise gb.UserError("not this one")

    def falls(model, data):
        raise ZeroDivisionError

    found = gb.testbed.score(refuses, models=["logits x 1e4", "linear"])
    assert [outcome.wrong for outcome in found.outcomes] == ["", "accused"]
    assert found.outcomes[0].judgement.reasons == ["refused: not this one"]
    with pytest.raises(ZeroDivisionError):
        gb.testbed.score(falls, models=["linear"])


def test_a_cut_run_goes_on(tmp_path):
    asked = []

    def auditor(model, data):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(model)
        return True

    with pytest.raises(KeyboardInterrupt):
        gb.testbed.score(auditor, models=FEW, out=tmp_path)
    assert len(list((tmp_path / "models").iterdir())) == 2
    (tmp_path / "models" / "four-grey-levels.json").write_text("{")  # damaged
    asked.clear()
    asked_before = 0
    with pytest.raises(KeyboardInterrupt):
        gb.testbed.score(auditor, models=FEW, out=tmp_path)
    assert len(asked) == 2 > asked_before  # the damaged one and the third
    asked.clear()
    found = gb.testbed.score(auditor, models=FEW[:3], out=tmp_path)
    assert not asked
    assert json.loads((tmp_path / "score.json").read_text()) == found.plain()
    assert found.missed == Rate.of(3, 3)
    with pytest.raises(gb.UserError, match="holds another run"):
        gb.testbed.score("pgd", models=FEW, out=tmp_path)


def test_the_auditors_draws_are_seeded(tmp_path):
    import torch

    drawn = []
    for seed in (0, 0, 1):
        gb.testbed.score(lambda model, data: drawn.append(float(torch.rand(()))) or True, models=["linear"], seed=seed)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("said", [True, np.bool_(True), np.array(True)])
def test_kinds_of_true(said):
    assert as_judgement(said, "x") == Judgement(trusted=True)


@pytest.mark.parametrize("said", [None, 1, "yes", 0.3, SimpleNamespace(accuracy=0.1)])
def test_what_is_no_judgement_is_refused(said):
    with pytest.raises(gb.UserError, match="True or False"):
        gb.testbed.score(lambda model, data: said, models=["linear"])


def test_broken_by_hand():
    low, high = Rate.of(5, 100), Rate.of(60, 100)
    base = Judgement(accuracy=low, uer=high)
    assert broken(Judgement(accuracy=low, uer=low), base) == {"universal": False, "per image": True}
    assert broken(Judgement(accuracy=high, uer=high), base) == {"universal": True, "per image": False}
    assert broken(Judgement(accuracy=Rate.of(11, 100)), base) == {"per image": True}  # its interval meets the network's
    assert broken(Judgement(), base) == {}


def test_a_robust_claim_decides_over_the_numbers():
    claim = SimpleNamespace(robust=True, accuracy=Rate.of(0, 100))
    found = gb.testbed.score(lambda model, data: claim, models=["logits x 1e4"])
    assert found.missed.value == 1
    found = gb.testbed.score(lambda model, data: SimpleNamespace(robust=False), models=["logits x 1e4", "linear"])
    assert found.missed.value == 0
    assert found.accused.value == 0  # not robust is not distrust


def test_an_audit_is_read(digits, trained):
    found = gb.audit(trained, digits, gb.auditing.SUITES["quick"].model_copy(update=CHEAP))
    judgement = as_judgement(found, "x")
    assert judgement.trusted == found.verdict.trusted
    assert judgement.reasons == found.verdict.reasons
    assert judgement.uer.value >= found.results.middle.uer.value
    assert judgement.accuracy.value <= found.results.per_image[0].accuracy.value


CHEAP = {
    "eps": (0.15,),
    "universal_steps": 20,
    "universal_probe_starts": 0,
    "eps_uni_runs": 0,
    "jacobian_backwards": 0,
    "universal_queries": 300,
    "surrogate": "none",
    "test_images": 100,
    "sample": 50,
    "queries": 0,
    "suite_images": 0,
    "pgd_steps": 5,
    "pgd_restarts": 1,
    "rescoring": False,
    "edits": (),
    "eps_adv": False,
}


@pytest.mark.full
def test_the_quick_audit_misses_no_masked_gradient_and_accuses_no_honest_net():
    found = gb.testbed.score("quick", models=FEW)
    assert not found.wrong()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def judge(model, data):\n    return True\n")
    assert run(["testbed", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    stored = (Path(gb.__file__).parent / "testbed" / "models.json").read_text()
    assert json.loads(stored) == listing(), "models.json is stale: see gambeson.testbed.library.listing"
    assert [entry["name"] for entry in listed] == [entry.name for entry in gb.testbed.models("digits")]
    assert listed[0].keys() == {"name", "kind", "honest", "how", "source", "held_out", "library"}
    assert run(["testbed", "list", "--data", "cifar10"]) == 0
    assert "pgd-adversarial" in capsys.readouterr().out
    call = ["testbed", "score", "--auditor", "mine.py:judge", "--json", "--models"]
    assert run([*call, "distillation, temperature 100,standard", "--out", "o"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in printed["outcomes"]] == ["distillation, temperature 100", "standard"]
    assert printed == json.loads((tmp_path / "o" / "score.json").read_text())
    assert run(["testbed", "score", "--auditor", "mine.py:judge", "--models", "standard,linear"]) == 0
    assert "accused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auditor", "pgdd"], "unknown auditor 'pgdd': did you mean pgd"),
        (["--auditor", "missing.py:judge"], "does not exist"),
        (["--auditor", "pgd", "--models", "nosuch"], "unknown model of the testbed on digits 'nosuch'"),
        (["--auditor", "pgd", "--models", ","], "expected a list of names"),
        (["--auditor", "pgd", "--data", "imagenet"], "unknown data of the testbed"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["testbed", "score", *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


class Says:
    """An auditor with a setting."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, model, data):
        return self.answer


def says(answer, model, data):
    return answer


def test_stored_judgements_are_of_the_same_auditor_and_its_settings(tmp_path):
    names = ["four grey levels", "standard"]
    makers = {
        "partial": lambda answer: functools.partial(says, answer),
        "object": Says,
        "closure": lambda answer: lambda model, data: answer,
    }
    for kind, make in makers.items():
        yes, no = (gb.testbed.score(make(answer), "digits", names, out=tmp_path / kind) for answer in (True, False))
        assert (yes.missed.value, yes.accused.value) == (1, 0), kind
        assert (no.missed.value, no.accused.value) == (0, 1), kind


def test_an_auditor_that_attacks_nothing_breaks_nothing():
    def clean(model, data):
        return gb.testbed.Judgement(accuracy=gb.evaluation.accuracy(model, data.test))

    assert gb.testbed.score(clean, "digits", ["four grey levels", "standard"]).missed.value == 1


def test_rates_that_are_none_are_refused_and_data_are_not_spoilt():
    rate = gb.tasks.Rate.of(5, 10)
    for bad in ({"n": 0}, {"value": 3.0, "high": 4.0}, {"low": 0.9}):
        with pytest.raises(gb.UserError, match="expected a share of"):
            gb.testbed.score(
                lambda model, data, bad=bad: gb.testbed.Judgement(accuracy=rate.model_copy(update=bad)),
                "digits",
                ["standard"],
            )

    def vandal(model, data):
        data.test.images.zero_()
        return True

    gb.testbed.score(vandal, "digits", ["standard"])
    assert bool(gb.testbed.load("standard").data.test.images.any())
