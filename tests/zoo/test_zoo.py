"""The zoo on a small package of its own, and what the shipped package has."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

import gambeson as gb
from gambeson.attacks import load as load_perturbation
from gambeson.base import UserError, load_tensors, read_settings, save_tensors, write_json
from gambeson.cli.app import run
from gambeson.evaluation import Rate, accuracy, load_model, universal_evasion
from gambeson.models import fingerprint
from gambeson.models import zoo as files
from gambeson.models.loading import check_source
from gambeson.training import TrainRun
from gambeson.training.run import _model, _source
from tests.conftest import quickly

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "packages" / "gambeson-zoo"
NAME = "digits/lenet5/tiny"


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def shipped(data=""):
    stored = json.loads((SHIPPED / "src" / "gambeson_zoo" / files.MANIFEST).read_text())["entries"]
    return {name: entry for name, entry in stored.items() if name.startswith(data)}


@pytest.fixture(scope="module")
def content(tmp_path_factory, trained, digits):
    """A package with one entry."""
    folder = tmp_path_factory.mktemp("zoo") / "gambeson_zoo"
    entry = folder / NAME
    gb.models.save(trained, entry / files.WEIGHTS)
    (entry / files.RUN).write_text("{kind: train, data: digits, model: lenet5, defense: {name: standard}}")
    uap = gb.attacks.StochasticPGD(eps=0.15, steps=10, probe_starts=0).craft(trained, digits)
    uap.save(entry / files.UAP)
    (entry / "audit").mkdir()
    shutil.copy(ROOT / "results" / "quickstart" / "standard" / "result.json", entry / files.AUDIT)
    (entry / files.CARD).write_text("# tiny\n")
    told = {"data": "digits", "model": "lenet5", "defense": "standard", "parameters": 1, "eps": 0.15, "norm": "inf"}
    told |= {"summary": "no defence", "attack": "stochastic-pgd", "suite": Rate.of(1, 100).plain()}
    told |= {"trusted": True, "verdict": "broken", "test": digits.test.fingerprint}
    told |= {"clean": accuracy(trained, digits).plain(), "uer": universal_evasion(trained, digits, uap).plain()}
    every = (files.WEIGHTS, files.RUN, files.UAP, files.AUDIT, files.CARD)
    told["files"] = {file: digest(entry / file) for file in every}
    write_json(folder / files.MANIFEST, {"form": files.FORM, "entries": {NAME: told}})
    return folder


@pytest.fixture
def package(content, tmp_path, monkeypatch):
    """A copy of it, as if it were installed."""
    folder = tmp_path / "site" / "gambeson_zoo"
    shutil.copytree(content, folder)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def change(package, **told):
    """Change what the manifest says of the entry; ``files`` are hashed again."""
    stored = json.loads((package / files.MANIFEST).read_text())
    entry = stored["entries"][NAME]
    entry |= told
    entry["files"] = {file: digest(package / NAME / file) for file in entry["files"]}
    write_json(package / files.MANIFEST, stored)


def test_an_entry_is_listed_and_loaded_by_its_name(package, trained, content):
    (entry,) = gb.zoo.list()
    assert str(entry) == f"{NAME}: no defence"
    assert gb.zoo.list(data="digits", defense="standard") == (entry,) == gb.zoo.list(model="lenet5")
    for none in ({"data": "fashion-mnist"}, {"model": "lenet"}, {"defense": "jacobian"}):
        with pytest.raises(UserError, match=f"unknown {next(iter(none))} of the zoo .*: (choose|did you mean)"):
            gb.zoo.list(**none)
    assert fingerprint(gb.zoo.load(NAME)) == fingerprint(trained)
    uap = gb.zoo.load_uap(NAME)
    assert torch.equal(uap.delta, gb.attacks.UniversalPerturbation.load(content / NAME / files.UAP).delta)
    assert uap.about.model == fingerprint(trained)
    assert gb.zoo.card(NAME).startswith("# tiny\n\n## Files\n")
    digest = hashlib.sha256((content / NAME / files.WEIGHTS).read_bytes()).hexdigest()
    assert f"| `{files.WEIGHTS}` | `{digest}` |" in gb.zoo.card(NAME)
    assert gb.zoo.load_audit(NAME).subject.label == "standard"


def test_a_name_of_the_zoo_is_a_model_and_a_perturbation(package, trained, digits, tmp_path):
    named = f"zoo:{NAME}"
    check_source(named)
    found = load_model(named)
    assert (found.dataset.name, found.label, found.trained["model"]) == ("digits", "tiny", "lenet5")
    assert fingerprint(found.model) == fingerprint(trained)
    assert torch.equal(load_perturbation(named).delta, gb.attacks.UniversalPerturbation.load(named).delta)
    with pytest.raises(UserError, match=r"normalises its pixels itself: leave \?normalise=none out"):
        load_model(f"{named}?normalise=none")
    with pytest.raises(UserError, match="perturbation of whole images: expected a patch"):
        gb.attacks.AdversarialPatch.load(named)
    settings = {"data": "digits", "model": "lenet5", "defense": {"name": "standard"}}
    assert fingerprint(_model(TrainRun(**settings, init=named), digits)) == fingerprint(trained)
    assert fingerprint(_source(TrainRun(**settings), named, tmp_path, digits)) == fingerprint(trained)


def test_the_commands_take_a_name_of_the_zoo(package, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (entry,) = gb.zoo.list()
    assert run(["zoo", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [entry.plain()]
    assert run(["zoo", "list"]) == 0
    assert NAME in capsys.readouterr().out
    assert run(["zoo", "show", NAME]) == 0
    assert capsys.readouterr().out == gb.zoo.card(NAME) + "\n"
    assert run(["zoo", "show", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == entry.plain() | {"card": gb.zoo.card(NAME)}
    assert run(["uap", "score", f"zoo:{NAME}", f"zoo:{NAME}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uer"] == entry.uer.plain()


def test_a_comparison_of_models_of_other_data_is_refused_before_any_audit(package, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/run.yaml").write_text("{kind: train, data: mnist5k}")
    assert run(["compare", f"zoo:{NAME}", "run"]) == 2
    assert "the models are of other data (digits and mnist5k)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "site"] == ["run"]


def test_a_verified_entry_has_the_stored_rates(package, capsys):
    (entry,) = gb.zoo.list()
    found = gb.zoo.verify(NAME)
    assert found.passed
    assert (found.clean, found.uer) == (entry.clean, entry.uer)
    assert run(["zoo", "verify"]) == 0
    assert "yes" in capsys.readouterr().err


@pytest.mark.parametrize("file", [files.WEIGHTS, files.UAP, files.CARD, files.AUDIT])
def test_a_damaged_file_is_refused(package, file, capsys):
    place = package / NAME / file
    content = bytearray(place.read_bytes())
    content[-2] ^= 1
    place.write_bytes(content)
    load = {files.WEIGHTS: gb.zoo.load, files.UAP: gb.zoo.load_uap, files.CARD: gb.zoo.card}.get(
        file, gb.zoo.load_audit
    )
    with pytest.raises(UserError, match=f"{place} is damaged: its sha256 is .* pip install --force-reinstall"):
        load(NAME)
    found = gb.zoo.verify(NAME)
    assert not found.passed
    assert found.clean is None
    assert run(["zoo", "verify", NAME]) == 2
    assert f"error: {NAME} is not verified: {place} is damaged" in capsys.readouterr().err
    place.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        load(NAME)


def test_a_changed_network_with_a_new_digest_fails_by_its_rates(package):
    place = package / NAME / files.WEIGHTS
    tensors, about = load_tensors(place)
    last = next(name for name in reversed(tensors) if name.endswith("weight"))
    tensors[last].view(-1)[0] += 20
    save_tensors(place, tensors, about)
    change(package)
    found = gb.zoo.verify(NAME)
    assert not found.passed
    assert found.reason.startswith("accuracy is ")
    assert ", and was " in found.reason


@pytest.mark.parametrize("rate", ["clean", "uer"])
def test_a_rate_may_differ_by_one_image_in_a_thousand(package, rate):
    (entry,) = gb.zoo.list()
    now = getattr(entry, rate)
    change(package, **{rate: Rate.of(round(now.value * now.n) + 1, now.n).plain()})
    found = gb.zoo.verify(NAME)
    assert not found.passed  # one of 449
    assert found.reason.startswith({"clean": "accuracy", "uer": "UER"}[rate])
    change(package, **{rate: now.model_copy(update={"value": now.value + 0.0009}).plain()})
    assert gb.zoo.verify(NAME).passed


def test_other_test_images_are_told_from_other_answers(package):
    change(package, test="0" * 16)
    assert gb.zoo.verify(NAME).reason == "the test images of digits are not those that it was scored on"


def test_a_pickle_is_never_loaded(package):
    (package / NAME / files.UAP).write_bytes(pickle.dumps({"delta": 1}))
    change(package)
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        gb.zoo.load_uap(NAME)
    assert "is a pickle" in gb.zoo.verify(NAME).reason


def test_a_name_that_is_not_there_is_answered_with_the_nearest(package, capsys):
    with pytest.raises(UserError, match=f"unknown entry of the zoo 'digits/lenet5/tinny': did you mean {NAME}"):
        gb.zoo.load("digits/lenet5/tinny")
    with pytest.raises(UserError, match=f"did you mean {NAME}"):
        load_model("zoo:tiny")
    assert run(["audit", "zoo:digits/lenet/tiny"]) == 2
    assert "unknown entry of the zoo" in capsys.readouterr().err
    assert run(["report", f"zoo:{NAME}"]) == 2
    assert f"zoo:{NAME} is a model, not the folder of an audit: run gambeson audit" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown file of digits/lenet5/tiny 'model\.pt'"):
        files.path(NAME, "model.pt")


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    monkeypatch.setattr(files, "_CHECKOUT", Path("/nowhere"))
    with pytest.raises(UserError, match="not installed: run pip install gambeson-zoo"):
        gb.zoo.list()
    assert run(["zoo", "list"]) == 2
    assert "pip install gambeson-zoo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"form": 2, "entries": {}}', "it is of form 2, not 1"),
        ("{", ".* is not valid JSON .*"),
        ("[1]", "it lists no entries"),
        ('{"form": 1}', "it lists no entries"),
        ('{"form": 1, "entries": [1]}', "it lists no entries"),
        ('{"form": 1, "entries": {"digits/lenet5/tiny": "x"}}', "it lists no entries"),
        ('{"form": 1, "entries": {"digits/lenet5/tiny": {"colour": "red"}}}', "Entry has no setting 'colour'.*"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(package, text, reason):
    (package / files.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=rf"cannot be used \({reason}\): install versions that fit each other"):
        gb.zoo.list()


@pytest.mark.parametrize("outside", ["../../secret", "/etc/hostname", "audit/../../x", "", "audit\\..\\x", "card.md\n"])
def test_no_name_of_a_manifest_leads_out_of_the_package(package, outside):
    stored = json.loads((package / files.MANIFEST).read_text())
    (told,) = stored["entries"].values()
    named = {"form": files.FORM, "entries": {outside: told}}
    holding = {"form": files.FORM, "entries": {NAME: {**told, "files": {**told["files"], outside: "0" * 64}}}}
    for manifest in (named, holding):
        write_json(package / files.MANIFEST, manifest)
        with pytest.raises(UserError, match=r"cannot be used \(Entry\.(name|files)"):
            files.path(NAME, files.CARD)


def test_verification_goes_on_past_an_entry_without_data_or_of_another_size(package, capsys):
    change(package, data="gone")
    assert gb.zoo.verify(NAME).reason.startswith("unknown data set 'gone'")
    tensors, about = load_tensors(package / NAME / files.UAP)
    save_tensors(package / NAME / files.UAP, {**tensors, "delta": torch.zeros(1, 1, 9, 9)}, about)
    change(package, data="digits")
    assert run(["zoo", "verify"]) == 2
    assert f"error: {NAME} is not verified: the perturbation is for images of (1, 9, 9)" in capsys.readouterr().err


@pytest.fixture
def of_the_tree(monkeypatch):
    """The package of the source tree, whatever is installed."""
    monkeypatch.setattr(files, "find_spec", lambda _: None)


def test_the_command_of_the_cards_makes_the_shipped_entries(of_the_tree):
    make_zoo = importlib.import_module("make_zoo")
    assert sorted(make_zoo.NAMES) == [entry.name for entry in gb.zoo.list()]
    for name in make_zoo.NAMES:
        run, how = make_zoo.training(name)
        assert TrainRun(**read_settings(files.path(name, files.RUN), "train")) == run
        assert gb.zoo.entry(name).summary == how.summary
        assert f"python benchmarks/make_zoo.py {name}`" in gb.zoo.card(name)


def test_the_shipped_package_is_complete_and_small():
    stored = shipped()
    folder, kinds = SHIPPED / "src" / "gambeson_zoo", {".safetensors", ".yaml", ".json", ".md"}
    listed = {f"{name}/{file}" for name, entry in stored.items() for file in entry["files"]}
    here = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in kinds} - {files.MANIFEST}
    assert here == listed
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= kinds | {".py", ".pyc"}
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 5e6
    assert all(len(entry["files"]) == 5 and entry["license"] == "Apache-2.0" for entry in stored.values())
    assert (SHIPPED / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", quickly(shipped(), *shipped("digits/")))
def test_a_shipped_entry_agrees_with_its_run_its_audit_and_its_card(of_the_tree, name):
    entry, model, uap = gb.zoo.entry(name), gb.zoo.load(name), gb.zoo.load_uap(name)
    trained, audit, card = (
        read_settings(files.path(name, files.RUN), "train"),
        gb.zoo.load_audit(name),
        gb.zoo.card(name),
    )
    assert audit.subject.fingerprint == fingerprint(model)
    assert audit.middle.attack == uap.about.attack == entry.attack
    assert uap.about.attack != "stochastic-pgd" or uap.about.model == fingerprint(model)
    assert trained["data"] == audit.material.name == entry.data
    assert trained["defense"]["name"] == audit.subject.defense["name"] == entry.defense
    assert audit.middle.eps == uap.about.eps == entry.eps
    assert audit.verdict.summary == entry.verdict
    assert audit.verdict.trusted == entry.trusted
    assert uap.about.crafted_split != "test"
    for rate in (entry.clean, entry.uer, entry.suite):
        assert str(rate) in card
    assert abs(audit.middle.uer.value - entry.uer.value) < 0.1


@pytest.mark.parametrize("page", [ROOT / "docs" / "zoo.md", SHIPPED / "README.md"])
def test_the_python_of_a_page_runs(of_the_tree, page, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    scope = {}
    exec(compile(code, page.name, "exec"), scope)
    assert scope["uap"].about.eps == (0.15 if "digits" in code else 0.1)
    assert "lenet5/shared-s64" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("name", shipped())
def test_a_shipped_entry_verifies(of_the_tree, name):
    try:
        gb.data.load(name.partition("/")[0])
    except UserError as error:
        pytest.skip(str(error))
    found = gb.zoo.verify(name)
    assert found.passed, found.reason
