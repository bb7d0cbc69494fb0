"""Stored results: each says how it was made, and a number that is changed is found."""

import importlib
import json
import shutil

import pytest

from gambeson.evaluation import Rate
from gambeson.studies import Study
from tests.test_docs import ROOT


@pytest.fixture
def check():
    return importlib.import_module("results_check")


@pytest.fixture
def copy(tmp_path, check):
    def change(name, edit):
        folder = shutil.copytree(check.stored.RESULTS, tmp_path / "results")
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))
        return folder

    return change


def test_the_stored_results_do_not_contradict_each_other(check):
    assert list(check.contradictions(check.stored.RESULTS)) == []


def _row(content):
    return next(row for row in content["rows"] if row["defense"] == "trades")["values"]["uap.uer"]


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("defenses.json", lambda it: _row(it).update(value=0.1), "another interval"),
        ("defenses.json", lambda it: _row(it).update(value=0.12345), "no share of 10000"),
        ("defenses.json", lambda it: it["rows"][0]["values"].update({"x.uer": {"value": 0}}), "no cell of the study"),
        ("scale.json", lambda it: it["about"].pop("date"), "does not say how it was made"),
        ("autoattack.json", lambda it: it["summary"]["pyautoattack"].update(robust_ours=0.8), "not that of the rows"),
    ],
)
def test_a_changed_number_is_found(check, copy, name, edit, said):
    (found,) = check.contradictions(copy(name, edit), name)
    assert found.startswith(name)
    assert said in found


def test_a_result_goes_on_where_it_was_cut_unless_its_settings_changed(check, tmp_path):
    file = tmp_path / "x.json"
    rows = check.stored.Rows(file, "python x.py", {"steps": 3})
    rows.add("a", 1, total=1)
    again = check.stored.Rows(file, "python x.py", {"steps": 3})
    assert again.missing(["a", "b"]) == ["b"]
    assert check.stored.Rows(file, "python x.py", {"steps": 4}).missing(["a", "b"]) == ["a", "b"]
    content = json.loads(file.read_text())
    shutil.copy(check.stored.RESULTS / check.stored.MADE, tmp_path)
    (about,) = check.stored.abouts(file, content, tmp_path)
    assert (about.command, about.settings, content["total"]) == ("python x.py", {"steps": 3}, 1)


@pytest.mark.full
def test_the_command_fails_where_a_number_was_changed(check, copy, capsys):
    folder = copy("defenses.json", lambda it: _row(it).update(value=0.1))
    assert check.main(["--results", str(folder), "--quick"]) == 1
    assert "1 contradictions\n  defenses.json" in capsys.readouterr().out


@pytest.mark.full
def test_a_number_that_is_changed_with_its_interval_is_found_by_computing_it_again(check, copy):
    def better(content):
        scales = content["rows"]["digits, standard"]["scales"]
        (one,) = (one for one in scales if one["multiple"] == 1)
        one["pgd accuracy"] = Rate.of(200, one["pgd accuracy"]["n"]).plain()

    folder = copy("scale.json", better)
    assert list(check.contradictions(folder, "scale.json")) == []
    assert check.main(["--results", str(folder), "--only", "scale.json"]) == 1
    assert check.main(["--only", "scale.json"]) == 0


def test_every_study_file_is_one():
    names = [Study.load(file).name for file in (ROOT / "studies").glob("*.yaml")]
    assert len(names) == len(set(names)) > 5
