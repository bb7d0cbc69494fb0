"""Hardening: what it gains and keeps on digits, which epoch it takes, when it stops, and what it refuses at once."""

import copy
import json
import random
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.auditing.clock import now
from gambeson.base import OutOfSpace
from gambeson.base.files import read_yaml
from gambeson.cli.app import run
from gambeson.hardening import Hardening, HardenRun, job, plan_harden, run_harden
from gambeson.hardening import run as harden_run
from gambeson.hardening.collapse import collapsed
from gambeson.hardening.job import Job
from gambeson.hardening.settings import Schedule
from gambeson.models.loading import trained_on
from gambeson.models.storage import FILE_NAME
from gambeson.report.page import _tight as tight
from gambeson.training import loop
from gambeson.training.loop import Run
from gambeson.training.validation import validate
from tests.cli.test_cli import says
from tests.conftest import full

SMALL = [
    *("--data", "digits", "--eps", "0.1", "--suite", "glance", "--set", "suite.minutes=null", "--keep-accuracy", "3"),
    *("--set", "epochs=10", "--set", "batch_size=64", "--lr", "0.1"),
]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The folder of a hardening by the command line."""
    root = tmp_path_factory.mktemp("harden")
    gb.models.save(trained, root / "net.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "LOOKS", 2)
        assert run(["harden", str(root / "net.safetensors"), *SMALL, "--out", str(root / "h")]) == 0
    return root / "h"


@pytest.fixture(scope="module")
def found(folder):
    """Its result, read again: a finished hardening trains and crafts nothing."""
    settings = {
        k: v for k, v in yaml.safe_load((folder / "run.yaml").read_text()).items() if k in HardenRun.model_fields
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gb.training.loop.Run, "_epoch", None)
        patch.setattr(gb.attacks.StochasticPGD, "craft", None)
        return run_harden(HardenRun(**settings), folder)


def test_a_hardened_model_withstands_more_and_keeps_its_accuracy(found, folder, trained, digits):
    changes = {change.name: change for change in found.comparison.changes}
    assert changes["per_image:pgd"].outcome == "better"
    assert changes["per_image:pgd"].difference.value > 0.2
    assert changes["uer@0.1"].outcome != "worse"
    base, kept = (validate(model, digits)["validation_accuracy"] for model in (trained, found.model))
    assert kept >= base - 0.03
    looks = [
        entry for entry in found.history if "validation_uer" in entry and entry["validation_accuracy"] >= base - 0.03
    ]
    best = max(looks, key=lambda entry: entry["validation_pgd_accuracy"] - entry["validation_uer"])
    assert found.history[found.epoch - 1] == best
    assert kept == best["validation_accuracy"]
    assert not found.model.training


def test_a_hardening_leaves_the_model_the_numbers_and_one_page(found, folder):
    stored = gb.models.load(folder / "model.safetensors")
    assert gb.models.fingerprint(stored) == gb.models.fingerprint(found.model)
    result = json.loads((folder / "result.json").read_text())
    assert result["summary"] == found.summary
    uer = {change.name: change for change in found.comparison.changes}["uer@0.1"]
    assert (
        f"{100 * uer.second.value:.1f} % of test images, and the original on {100 * uer.first.value:.1f} %"
        in found.summary
    )
    page = (folder / "report.html").read_text()
    assert "original" in page
    assert "hardened" in page
    kept = found.history[found.epoch - 1]
    rates = [100 * kept[f"validation_{name}"] for name in ("accuracy", "uer", "pgd_accuracy")]
    assert found.choice.startswith(
        f"Epoch {found.epoch} of {len(found.history)} was selected on validation, where at most 3 points of clean "
        "accuracy could be lost: it has {:.1f} % right, {:.1f} % wrong under one pattern and {:.1f} % right under "
        "PGD; the original has ".format(*rates)
    )
    assert tight(found.choice) in page
    assert result["original"] == found.original
    assert yaml.safe_load((folder / "run.yaml").read_text())["finished"] is True
    assert found.after.results.subject.defense["eps"] == 0.1
    assert found.before.results.settings == found.after.results.settings


def test_the_folder_of_a_hardening_is_a_model(found, folder, tmp_path):
    taken = gb.evaluation.load_model(folder)
    assert gb.models.fingerprint(taken.model) == gb.models.fingerprint(found.model)
    assert taken.dataset.name == trained_on(str(folder)) == "digits"
    assert (taken.label, taken.trained["defense"]["eps"]) == ("gambeson", 0.1)
    assert plan_harden(HardenRun(model=str(folder), recipe={"batch_size": 256})).epochs == 40
    (again := tmp_path / "again").mkdir()  # hardened again, without naming the data
    (again / "run.yaml").write_text(yaml.safe_dump({"kind": "harden", "model": str(folder), "data": None}))
    assert trained_on(str(again)) == "digits"
    with pytest.raises(UserError, match=r"again.model\.safetensors does not exist: expected a file of weights"):
        gb.evaluation.load_model(again)


def test_a_finished_hardening_says_again_what_it_found_and_how_to_take_its_weights(
    found, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(job, "LOOKS", 2)
    assert run(["harden", str(folder.parent / "net.safetensors"), *SMALL, "--out", str(folder)]) == 0
    said = capsys.readouterr().err
    heading = next(line for line in said.splitlines() if line.split()[-3:] == ["change", "p", "outcome"])
    assert heading.split() == ["original", "hardened", "change", "p", "outcome"]
    told = " ".join(said.split())
    assert found.summary in told
    assert f"note: {found.choice}" in told
    command = said.split("gambeson export ")[1].split()
    assert command == [str(folder), "--to", "safetensors"]
    assert {f"body.{name}" for name in found.model.body.state_dict()} <= {*gb.base.load_tensors(folder / FILE_NAME)[0]}
    assert run(["export", *command, "--out", str(tmp_path / "plain.safetensors")]) == 0
    own = found.model.body.state_dict()
    plain = gb.base.load_tensors(tmp_path / "plain.safetensors")[0]
    assert all(torch.equal(plain[name], value) for name, value in own.items())


def test_the_summary_says_what_the_test_split_lost(found):
    strict = found.__class__(**{**vars(found), "keep_accuracy": -100.0})
    assert "points were lost on test, although at most -100 on validation" in strict.summary
    assert "were lost on test" not in found.__class__(**{**vars(found), "keep_accuracy": 100.0}).summary


def test_the_summary_names_what_is_clearly_worse(found):
    def said(name, like, outcome):
        changes = {one.name: one for one in found.comparison.changes}
        changes[name] = changes[like].model_copy(update={"name": name, "outcome": outcome})
        points = [SimpleNamespace(eps=eps) for eps in (0.05, 0.1, 8 / 255)]
        return found.__class__(
            **vars(found)
            | {
                "comparison": found.comparison.model_copy(update={"changes": list(changes.values())}),
                "before": SimpleNamespace(results=SimpleNamespace(middle=points[1], universal=points)),
            }
        ).summary

    assert "learly worse" not in found.summary
    rates = {one.name: (100 * one.second.value, 100 * one.first.value) for one in found.comparison.changes}
    for name, like, what in (
        ("uer@0.05", "uer@0.1", "the error under one pattern of eps 0.05"),
        (f"uer@{8 / 255:.4g}", "uer@0.1", "the error under one pattern of eps 8/255"),
        ("per_image:pgd", "per_image:pgd", "per_image:pgd"),
    ):
        now, before = rates[like]
        words = f"Clearly worse is {what}: {now:.1f} %, and {before:.1f} % before."
        assert words in said(name, like, "worse")
        assert words not in said(name, like, "better")
    assert said("uer@0.1", "uer@0.1", "worse").count("clearly worse") == 1


def history(accuracies, pgd=()):
    looks = [{"validation_uer": 0.1, "validation_pgd_accuracy": value} for value in pgd]
    by_class = [
        {"validation_accuracy": a, "validation_balanced_accuracy": a, "validation_balanced_chance": 0.13}
        for a in accuracies
    ]
    return [entry | look for entry, look in zip(by_class, looks or [{}] * 9, strict=False)]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (history([0.9, 0.1]), "constant or random"),
        (history([0.88, 0.84, 0.78]), "fell 3 epochs in a row, from 90.0 % at the beginning to 78.0 %"),
        (history([0.9, 0.9, 0.9], [0.3, 0.6, 0.2]), "fell from 60.0 % to 20.0 %"),
        (history([0.88, 0.84, 0.81]), ""),  # by less than a tenth
        (history([0.7, 0.72, 0.71, 0.7]), ""),  # not in a row
        (history([0.9, 0.9], [0.6, 0.4]), ""),
        (history([0.9, 0.9], [0.2, 0.06]), ""),
    ],
)
def test_a_collapse_is_seen(digits, entries, words):
    said = collapsed(entries, 0.9, digits.validation)
    assert words in said
    assert bool(words) == bool(said)


def job_of(model, digits, **settings):
    return Job(model, digits, Hardening(**{"eps": 0.2, "recipe": {"batch_size": 256, "epochs": 6}, **settings}))


def schedule_of(made, every=1):
    suite = gb.auditing.SUITES["quick"]
    return Schedule(epochs=6, robust_every=every, suite=suite, base=made.base, settings={})


def test_training_that_collapses_ends_with_its_reason(trained, digits, tmp_path):
    made = job_of(trained, digits, recipe={"batch_size": 256, "epochs": 6, "lr": 1.0, "warmup": 0, "ema": None})
    schedule = schedule_of(made)
    with pytest.raises(UserError, match="stopped because .*, and no epoch kept the accuracy: the best lost"):
        made.train(schedule, tmp_path)
    assert len((tmp_path / "training" / "metrics.jsonl").read_text().splitlines()) < 6


def test_training_ends_when_its_time_is_over(trained, digits, tmp_path):
    made = job_of(trained, digits, minutes=1, keep_accuracy=100)
    made.began = now() - 60
    net, entries, notes = made.train(schedule_of(made), tmp_path)
    assert len(entries) == 1
    assert notes == ["The training ended after 1 epoch: its part of the 1 minute was over."]
    assert gb.models.fingerprint(net) != gb.models.fingerprint(trained)


def test_a_training_that_ended_early_does_not_go_on_in_its_folder(trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate_robustly", drawn)
    made = job_of(trained, digits, minutes=1, keep_accuracy=100)
    made.began = now() - 60
    net, entries, notes = made.train(schedule_of(made), tmp_path)
    made.began = now()
    ended = schedule_of(made).model_copy(update={"ended": notes})
    again, same, told = made.train(ended, tmp_path)
    assert (same, told) == (entries, notes)
    assert gb.models.fingerprint(again) == gb.models.fingerprint(net)
    assert len(made.train(schedule_of(made), tmp_path)[1]) > 1


@pytest.mark.parametrize(("uer", "pgd", "better"), [(0.2, 0.5, True), (0.2, 0.4, False), (0.1, 0.3, False)])
def test_a_model_that_withstands_no_more_than_the_original_is_not_written(
    uer, pgd, better, trained, digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "validate_robustly", lambda *_: {"validation_uer": uer, "validation_pgd_accuracy": pgd})
    monkeypatch.setattr(job, "validate_robustly", lambda *_: {"validation_uer": 0.2, "validation_pgd_accuracy": 0.4})
    monkeypatch.setattr(Job, "audit", audited := Mock(side_effect=KeyboardInterrupt))
    settings = {"eps": 0.05, "keep_accuracy": 100, "recipe": {"batch_size": 256, "epochs": 1, "lr": 0.01}}
    words = rf"no epoch that .* {100 * uer:.1f} % wrong under one pattern .* original 9.* 20.0 % wrong .* give more"
    with pytest.raises(KeyboardInterrupt if better else UserError, match=None if better else words):
        gb.harden(trained, digits, out=tmp_path / "h", **settings)
    assert audited.called == better
    assert not (tmp_path / "h" / "model.safetensors").exists()


def test_a_refusal_says_how_many_points_were_lost(trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate_robustly", drawn)
    recipe = {"batch_size": 256, "epochs": 3, "lr": 1.0, "warmup": 0, "ema": None}
    with pytest.raises(
        UserError, match=r"the best lost \d+\.\d points .* --keep-accuracy allows 0\.5: give"
    ) as refused:
        gb.harden(trained, digits, eps=0.2, keep_accuracy=0.5, recipe=recipe)
    assert "least_accuracy" not in str(refused.value)


def drawn(model, *_):
    """In place of attacks: numbers that follow from the weights and rise and fall from epoch to epoch."""
    share = sum(float(weight.detach().double().abs().sum()) for weight in model.parameters()) * 1e3 % 1
    return {"validation_uer": 0.5 - share / 2, "validation_pgd_accuracy": 0.5 + share / 2}


@contextmanager
def dying(how):
    """Die in the middle of the fourth epoch, between its best weights and its state, or of a disk without its room."""
    limits, calls = resource.getrlimit(resource.RLIMIT_FSIZE), []
    owner, name, fatal = (Run, "train_step", 15) if how == "step" else (loop, "save_state", 4)
    real = getattr(owner, name)

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == fatal:
            if how != "disk":
                raise KeyboardInterrupt
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dies)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("how", "error"), [("step", KeyboardInterrupt), full("state", KeyboardInterrupt), ("disk", OutOfSpace)]
)
def test_a_training_that_was_cut_goes_on_bit_for_bit(how, error, trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate_robustly", drawn)
    small = (part.sample(count, seed=0) for part, count in ((digits.train, 256), (digits.validation, 64)))
    few = gb.data.Dataset("digits", *small, digits.test, digits.classes)
    recipe = {"batch_size": 64, "epochs": 6, "lr": 0.01}
    made = job_of(trained, few, eps=0.05, keep_accuracy=100, recipe=recipe)
    net, entries, notes = made.train(schedule_of(made), tmp_path / "whole")
    assert len({entry["validation_uer"] for entry in entries}) == 6
    with dying(how), pytest.raises(error):
        made.train(schedule_of(made), tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob("model.safetensors"))  # nothing that looks finished
    assert not list((tmp_path / "cut").rglob(".*"))  # or half-written
    assert len((tmp_path / "cut" / "training" / "metrics.jsonl").read_text().splitlines()) == 3 + (how != "step")
    again, same, told = made.train(schedule_of(made), tmp_path / "cut")
    assert (same, told) == (entries, notes)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    one, other = (tmp_path / name / "training" / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


def test_a_folder_keeps_its_hardening(folder, trained, digits):
    held = Schedule(**json.loads((folder / "schedule.json").read_text())).settings
    known = {key: value for key, value in held.items() if key in Hardening.model_fields}
    for other in ({"eps": 0.2}, {"seed": 1}, {"defense": {"beta": 3.0}}, {"keep_accuracy": 10}):
        with pytest.raises(UserError, match=rf"holds another run \(it differs in {next(iter(other))}"):
            gb.harden(trained, digits, out=folder, **{**known, **other})
    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    with pytest.raises(UserError, match="it differs in model"):
        gb.harden(other, digits, out=folder, **known)
    few = gb.data.Dataset("few", digits.train.subset(torch.arange(900)), digits.validation, digits.test, digits.classes)
    with pytest.raises(UserError, match=r"it differs in data\.train\)"):
        gb.harden(trained, few, out=folder, **known)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hardening_killed_at_random_ends_as_one_that_was_not(trained, tmp_path):
    gb.models.save(trained, tmp_path / "net.safetensors")
    command = ["harden", str(tmp_path / "net.safetensors"), *SMALL, "--out"]
    assert run([*command, str(tmp_path / "whole")]) == 0
    draw, cut = random.Random(0), tmp_path / "cut"
    for mark in ("schedule.json", "training/metrics.jsonl", "training/metrics.jsonl", "hardened/state/stages.json"):
        began, file = time.time(), cut / mark
        process = subprocess.Popen([sys.executable, "-m", "gambeson", *command, str(cut)])
        while process.poll() is None and not (file.is_file() and file.stat().st_mtime > began):
            time.sleep(0.01)
        time.sleep(draw.random() / 2)
        process.kill()
        process.wait()
        assert not (cut / "result.json").exists()
        assert not read_yaml(cut / "run.yaml")["finished"]
    assert run([*command, str(cut)]) == 0
    for name in ("model.safetensors", "training/model.safetensors", "training/metrics.jsonl"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert one == other


def test_no_epoch_that_lost_too_much_is_taken(trained, digits, tmp_path):
    made = job_of(trained, digits, keep_accuracy=0)
    base = made.base
    entries = [
        {"validation_accuracy": base - 0.01, "validation_uer": 0.0, "validation_pgd_accuracy": 1.0},
        {"validation_accuracy": base, "validation_uer": 0.2, "validation_pgd_accuracy": 0.5},
        {"validation_accuracy": base, "validation_uer": 0.1, "validation_pgd_accuracy": 0.3},
        {"validation_accuracy": 1.0},
    ]
    assert [made.rank(entry) for entry in entries] == [-1.0, pytest.approx(0.65), pytest.approx(0.6), -1.0]


def test_the_time_decides_how_long_to_train(trained, digits, monkeypatch):
    made = job_of(trained, digits, recipe={"batch_size": 128}, defense={"speed": "fast"})
    monkeypatch.setattr(made, "cost", made.cost.model_copy(update={"seconds_a_step": 0.4, "plain_ratio": 4.0}))
    steps, third = len(digits.train) // 128, len(digits.validation) / 3
    gradient = 0.1 / 128
    ten = 10 * (steps * 0.4 + gradient * third) + 7 * (gradient * (50 * 128 + 5000) + gradient * third)
    assert made.seconds(10) == pytest.approx(ten)  # a look every other epoch, at the original and at the first good one
    monkeypatch.setattr(Job, "_suite", lambda _: gb.auditing.SUITES["quick"])
    for minutes, loading, epochs in (
        (None, 0, 10),
        (made.seconds(10) / 27 + 0.01, 0, 10),
        (made.seconds(3) / 27 + 0.01, 0, 3),
        (made.seconds(3) / 27 + 1.01, 60, 3),
    ):
        made.settings, made.began = made.settings.model_copy(update={"minutes": minutes}), now() - loading
        assert made.schedule().epochs == epochs
    made.settings, made.began = made.settings.model_copy(update={"minutes": made.seconds(1) / 28}), now()
    with pytest.raises(UserError, match="is too short: loading took .*, and half of the rest is for the training"):
        made.schedule()


@pytest.mark.parametrize("suite", [None, "full", {"name": "quick", "minutes": 90}])
def test_what_loading_leaves_of_the_time_is_shared_out(suite, trained, digits):
    made = job_of(trained, digits, minutes=20, suite=suite)
    for loading, share in ((0, 5), (8, 3)):
        made.began = now() - 60 * loading
        found = made.schedule().suite
        assert found.minutes == pytest.approx(share, abs=0.2)
        assert found.eps == (0.1, 0.2, pytest.approx(0.3))


def test_a_suite_keeps_its_own_time(trained, digits):
    assert job_of(trained, digits, suite="glance").schedule().suite.eps == (0.2,)
    assert job_of(trained, digits, suite={"name": "quick", "minutes": 3}).schedule().suite.minutes == 3
    assert job_of(trained, digits, suite={"name": "quick", "minutes": 3}, minutes=20).schedule().suite.minutes == 3


class Fixed(nn.Module):
    """A classifier without parameters."""

    def forward(self, x):
        return x.flatten(1)[:, :10]


def test_what_cannot_be_hardened_is_refused_before_any_work(trained, digits, tmp_path, capsys):
    gb.models.save(trained, tmp_path / "net.safetensors")
    (tmp_path / "box.py").write_text("def ask(x):\n    raise RuntimeError\n")
    (tmp_path / "file").write_text("")
    net, out = str(tmp_path / "net.safetensors"), ["--data", "digits", "--out", str(tmp_path / "out")]
    says(capsys, ["harden", f"function:{tmp_path / 'box.py'}:ask", *out], "is a black box, whose weights cannot")
    says(capsys, ["harden", "http://localhost:1/x", *out], "is a black box")
    says(capsys, ["harden", net, *out[:2], "--out", str(tmp_path / "file" / "x")], "cannot be written")
    says(capsys, ["harden", net, *out, "--to", "onn"], "unknown export target", "onnx")
    says(capsys, ["harden", net, *out, "--suite", "quik"], "unknown suite", "quick")
    says(capsys, ["harden", net, *out, "--speed", "slow"], "--speed slow")
    says(capsys, ["harden", net, *out, "--keep-accuracy", "-1"], "--keep-accuracy -1")
    says(capsys, ["harden", net, *out, "--eps", "0"], "nothing to harden against")
    says(capsys, ["harden", net, *out, "--set", "lrr=1"], "no setting 'lrr'")
    says(capsys, ["harden", "lenet5", *out], "has not learnt", "train it before")
    says(capsys, ["harden", *out], "no model was given")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no weights that require a gradient"):
        gb.harden(Fixed(), digits, out=tmp_path / "out")
    labels = torch.zeros(60, 8, 8, dtype=torch.long)
    labels[:, :4] = 1
    maps = gb.data.Split("maps", torch.rand(60, 1, 8, 8), labels, ("a", "b"))
    with pytest.raises(UserError, match="hardening expects one label per image"):
        gb.harden(trained, maps, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing(trained, tmp_path, capsys):
    gb.models.save(trained, tmp_path / "net.safetensors")
    command = ["harden", str(tmp_path / "net.safetensors"), "--data", "digits", "--plan", "--json", "--speed", "fast"]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["epochs"] == 10
    assert cost["total"] > cost["seconds"] > cost["training"]["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_an_export_counts_once_its_check_was_passed(folder, monkeypatch, tmp_path):
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    asked = HardenRun(**{k: v for k, v in settings.items() if k in HardenRun.model_fields} | {"to": "safetensors"})
    made, agrees = [], True

    def exported(source, to, file, **more):
        assert not file.exists()
        file.write_text("a model")
        found = SimpleNamespace(agrees=agrees, largest_difference=0.5)
        if agrees is not None:
            (file.parent / f"{file.name}.json").write_text(json.dumps({"agrees": agrees}))
        made.append(file)
        return found

    loaded = SimpleNamespace(label="x", dataset=SimpleNamespace(name="digits"), trained={"data": "digits"})
    monkeypatch.setattr(harden_run, "_loaded", lambda *_: (loaded, SimpleNamespace(schedule=lambda _: None)))
    monkeypatch.setattr(harden_run, "hardened", lambda *_: "hardened")
    monkeypatch.setattr(harden_run, "run_export", exported)
    out = tmp_path / "h"
    agrees = False
    for count in (1, 2):  # and again when it is resumed
        with pytest.raises(UserError, match=r"does not score as the hardened model does .* 0\.5\): do not use it"):
            run_harden(asked, out)
        assert len(made) == count
        assert not yaml.safe_load((out / "run.yaml").read_text())["finished"]
    agrees = True
    for _ in range(2):
        assert run_harden(asked, out) == "hardened"
    assert len(made) == 3
    (out / f"{made[0].name}.json").unlink()  # as after a kill before the check
    run_harden(asked, out)
    assert len(made) == 4
