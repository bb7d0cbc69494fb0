"""Gates and comparisons on the command line, and the GitHub Action that runs them: exit codes, files, one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

import gambeson as gb
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.cli.app import run
from tests.cli.test_cli import says

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # synthetic audits with numbers that all differ

from report_audits import three, write_audit

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data", "digits", "--suite", "quick", "--eps", "0.05,0.1,0.2", "--surrogate", "none"),
    *("--set", "universal_steps=10", "--set", "universal_probe_starts=0", "--set", "pgd_steps=3"),
    *("--set", "sample=20", "--set", "queries=20", "--set", "test_images=60", "--set", "validation_images=60"),
    *(
        "--set",
        "jacobian_backwards=0",
        "--set",
        "universal_queries=300",
        "--set",
        "eps_uni_runs=0",
        "--set",
        "eps_adv=false",
    ),
]


@pytest.fixture(scope="module")
def audited(trained, tmp_path_factory):
    """A model's file, and its audit."""
    folder = tmp_path_factory.mktemp("gates")
    gb.models.save(trained, folder / "net.safetensors")
    assert run(["audit", str(folder / "net.safetensors"), *SMALL, "--out", str(folder / "a")]) == 0
    return folder


def text_of(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_an_audit_ends_with_3_where_a_gate_is_missed(audited, capsys, monkeypatch):
    command = ["audit", str(audited / "net.safetensors"), *SMALL, "--out", str(audited / "a")]
    monkeypatch.setattr(gb.models.loading, "load_model", None)  # finished: nothing is loaded or measured
    capsys.readouterr()
    assert run([*command, "--gate", "clean>=0.5, uer>=0"]) == 0
    assert "held" in text_of(capsys)
    files = {"--sarif": audited / "o" / "a.sarif", "--junit": audited / "o" / "a.xml"}
    options = [str(word) for pair in files.items() for word in pair]
    assert run([*command, "--gate", "clean>=0.5", "--gate", "uer<=0.0001, uer@0.2>=0.01", *options, "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert [gate["held"] for gate in result["gates"]] == [True, False, True]
    assert result["gates"][1]["value"] == result["universal"][1]["uer"]["value"]
    found = json.loads(files["--sarif"].read_text())["runs"][0]["results"]
    assert [one["ruleId"] for one in found if one["level"] == "error"] == ["gate/uer<=0.0001"]
    assert len(ElementTree.parse(files["--junit"]).findall(".//failure[@type='gate']")) == 1
    assert run([*command, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert "gates" not in plain
    assert plain == json.loads((audited / "a" / "result.json").read_text())


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("robust<=0.2", "unknown metric 'robust'"),
        ("uer<=20", "20 is no number from 0 to 1"),
        ("", "is empty"),
        ("uer@0.15<=0.2", "the audit has no eps 0.15: its curve is at 0.05, 0.1, 0.2"),
        ("eps_adv>=0.1", "eps_adv will not be searched"),
        ("mean_iou>=0.1", "labels are no maps"),
        ("check:statless", "did you mean stateless?"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused_before_the_audit(audited, tmp_path, capsys, gate, words):
    command = ["audit", str(audited / "net.safetensors"), *SMALL, "--out", str(tmp_path / "b"), "--gate", gate]
    says(capsys, command, words)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("trusted", "no audit is trusted whose suite leaves checks out"),
        ("check:no gradient masking", "unknown check"),
        ("check:no optimisation at test time", "the suite leaves this check out"),
        ("transfer<=0.9", "No perturbation was transferred"),
        ("corruption<=0.9", "the suite has no noise"),
        ("per_image:standard>=0", "the audit will have no such attack per image, but pgd, adaptive"),
        ("per_image:none>=0", "the audit will have no such attack per image"),
    ],
)
def test_a_gate_about_what_the_suite_leaves_out_is_refused_before_the_audit(audited, tmp_path, capsys, gate, words):
    command = ["audit", str(audited / "net.safetensors"), "--data", "digits", "--suite", "glance", "--gate", gate]
    says(capsys, [*command, "--out", str(tmp_path / "b")], words)
    assert not (tmp_path / "b").exists()


def test_files_that_cannot_be_written_are_named_before_the_audit(audited, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["audit", str(audited / "net.safetensors"), *SMALL, "--out", str(tmp_path / "b")]
    says(capsys, [*command, "--junit", str(tmp_path / "file" / "a.xml")], "cannot be written")
    assert not (tmp_path / "b").exists()


def test_a_report_judges_stored_audits_and_measures_nothing(tmp_path, capsys):
    folders, _ = three(tmp_path, with_jacobian=False)  # the third is not to be trusted
    names = [str(folder) for folder in folders]
    assert run(["report", names[1], "--gate", "uer<=0.2, clean>=0.9, trusted"]) == 0
    assert not (folders[1] / "report.html").exists()
    capsys.readouterr()
    assert run(["report", *names, "--gate", "clean>=0.9", "--gate", "uer<=60 %", "--json"]) == 3
    gates = json.loads(capsys.readouterr().out)["gates"]
    assert [[gate["held"] for gate in gates[name]] for name in names] == [[True, False], [True, True], [True, True]]
    assert run(["report", names[2], "--gate", "uer<=60 %"]) == 0
    assert "not to be trusted, and no gate asks for that" in text_of(capsys)
    assert run(["report", names[2], "--gate", "uer<=60 %, trusted"]) == 3
    files = [tmp_path / "x" / name for name in ("a.sarif", "a.xml", "card.md", "page.html")]
    options = zip(("--sarif", "--junit", "--card", "--out"), map(str, files), strict=True)
    assert run(["report", names[0], *(word for pair in options for word in pair)]) == 0
    assert all(file.stat().st_size > 500 for file in files)
    says(capsys, ["report", *names, "--card", str(tmp_path / "b.md")], "a card is about one model, and 3 audits")
    says(capsys, ["report", str(tmp_path / "none"), "--gate", "trusted"], "does not exist")
    (folders[0] / "result.json").write_text("{")
    says(capsys, ["report", names[0], "--gate", "trusted"], "is not valid JSON")


@pytest.mark.parametrize("option", ["--out", "--sarif", "--junit", "--card"])
def test_a_file_is_replaced_by_one_of_its_kind_alone(option, tmp_path, capsys):
    write_audit(tmp_path / "a", with_jacobian=False)
    own, mine = tmp_path / "made", tmp_path / "a" / "result.json"
    for _ in range(2):  # again, in its place
        assert run(["report", str(tmp_path / "a"), option, str(own)]) == 0
    before = mine.read_bytes()
    capsys.readouterr()
    says(capsys, ["report", str(tmp_path / "a"), option, str(mine)], f"{mine} exists and is not", "name another file")
    assert mine.read_bytes() == before
    for other in {"--out", "--sarif", "--junit", "--card"} - {option}:
        says(capsys, ["report", str(tmp_path / "a"), other, str(own)], f"{own} exists and is not")


def test_two_kinds_of_results_need_two_files(tmp_path, capsys):
    write_audit(tmp_path / "a", with_jacobian=False)
    one = str(tmp_path / "one")
    says(
        capsys, ["report", str(tmp_path / "a"), "--sarif", one, "--card", one], "two kinds of results", "name one each"
    )
    assert not (tmp_path / "one").exists()


def test_an_empty_gate_is_named(tmp_path, capsys):
    write_audit(tmp_path / "a", with_jacobian=False)
    says(capsys, ["report", str(tmp_path / "a"), "--gate", ""], "error: a gate in '' is empty")


def test_compare_tells_a_regression_by_its_exit_code(tmp_path, capsys):
    old, new = (str(tmp_path / name) for name in ("old", "new"))
    write_audit(tmp_path / "old", with_jacobian=False)
    write_audit(tmp_path / "new", label="new", wrong=(121, 397, 783, 811, 903), with_jacobian=False)
    assert run(["compare", old, new]) == 0
    told = text_of(capsys)
    assert "Clearly worse: uer@0.15" in told
    assert "compared by their intervals, which are wider, because outcomes per image were not kept" in told
    assert run(["compare", old, new, "--gate", "no-regression"]) == 3
    assert run(["compare", new, old, "--gate", "no-regression", "--gate", "uer<=0"]) == 0
    capsys.readouterr()
    assert run(["compare", old, new, "--gate", "uer@0.05.high<=0.04, uer<=0.05", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [gate["held"] for gate in found["gates"]] == [True, False]
    assert {one["name"]: one["outcome"] for one in found["changes"]}["uer@0.15"] == "worse"
    says(capsys, ["compare", old, new, "--gate", "trusted"], "unknown metric 'trusted': choose among no-regression")
    says(capsys, ["compare", old, new, "--data", "digits"], "--data: both audits are finished")
    write_audit(tmp_path / "other", with_jacobian=False, classes=["cat", "dog"])
    says(capsys, ["compare", old, str(tmp_path / "other")], "on other data (classes: 10 (digit 0", "audit both models")
    says(capsys, ["compare", old, str(tmp_path / "nothing.safetensors")], "nothing.safetensors")


def test_compare_audits_a_model_as_the_other_one_was(audited, tmp_path, capsys, monkeypatch):
    asked = []

    def stands_in(run, out):
        asked.append(run)
        shutil.copytree(audited / "a", out)
        return SimpleNamespace(results=AuditResult.load(out))

    monkeypatch.setattr("gambeson.auditing.run_audit", stands_in)
    shutil.copy(audited / "net.safetensors", tmp_path / "net.safetensors")
    net, one = str(tmp_path / "net.safetensors"), str(audited / "a")
    assert run(["compare", one, net, "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["lost"], one["gained"]) for one in found["changes"]} == {(0, 0)}
    assert (tmp_path / "net.safetensors-audit" / "outcomes.safetensors").is_file()
    assert run(["compare", net, one, "--data", "digits", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "first" / "outcomes.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["changes"] == found["changes"]
    settings = AuditResult.load(audited / "a").settings
    assert [one.suite.plain() for one in asked] == [Suite(**settings).plain()] * 2
    assert settings != SUITES["quick"].plain()
    asked.clear()
    both = ["compare", net, net, "--data", "digits", "--minutes", "3", "--out", str(tmp_path / "both")]
    assert run(both) == 0
    assert asked[0].suite.minutes == 1.5
    assert asked[1].suite.plain() == Suite(**settings).plain()
    capsys.readouterr()
    says(capsys, ["compare", one, net, "--data", "digits", "--suite", "full"], "is audited as it was; leave that out")


def action():
    return yaml.safe_load((ROOT / "action.yml").read_text())


def test_the_action_passes_inputs_by_variables_alone():
    found = action()
    assert found["runs"]["using"] == "composite"
    for step in found["runs"]["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"]  # an input pasted into a script could run as code
    used = json.dumps(found["runs"])
    for name, about in found["inputs"].items():
        assert about["description"]
        assert f"inputs.{name}" in used, name
    for name, output in found["outputs"].items():
        step, _, key = output["value"].strip("${ }").removeprefix("steps.").partition(".outputs.")
        made = {one.get("id"): one for one in found["runs"]["steps"]}[step]
        assert f"{key}=" in made["run"], name


class Act:
    """The audit's step of the action as it stands, with inputs in place of a workflow's."""

    def __init__(self, folder: Path, tool: str) -> None:
        self.folder, self.found = folder, action()
        (self.step,) = [one for one in self.found["runs"]["steps"] if one.get("id") == "audit"]
        (folder / "bin").mkdir()
        (folder / "bin" / "gambeson").write_text(tool)
        (folder / "bin" / "gambeson").chmod(0o755)

    def __call__(self, **given: str) -> tuple[int, dict[str, str], str, str]:
        """Run it: its exit code, outputs, summary and standard error."""
        inputs = {name: about.get("default", "") for name, about in self.found["inputs"].items()} | given
        variables = {
            name: inputs[value.removeprefix("${{ inputs.").removesuffix(" }}")]
            for name, value in self.step["env"].items()
        }
        outputs, summary = self.folder / "outputs", self.folder / "summary"
        for path in (outputs, summary):
            path.write_text("")
        paths = {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary)}
        paths |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self.step["run"]],
            env={**os.environ, **variables, **paths, "PYTHONPATH": str(Path(gb.__file__).parents[1])},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        found = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
        return done.returncode, found, summary.read_text(), done.stderr


STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, sys
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
out = pathlib.Path(os.environ["OUT"])
if sys.argv[1] == "report":
    out.mkdir(exist_ok=True)
    (out / "card.md").write_text("---\\nmodel-index: []\\n---\\n\\n## Adversarial robustness\\n")
sys.exit(int(os.environ.get("CODE_" + sys.argv[1], 0)))
"""


def test_the_action_hands_its_inputs_over_whole_and_its_exit_code_on(tmp_path, monkeypatch):
    act = Act(tmp_path, STAND_IN)
    given = {"model": "runs/my net", "gate": "$(touch hacked) `touch hacked` uer<=0.2", "out": "my out"}
    code, outputs, summary, _ = act(**given, minutes="2.5", options="--set 'controls=[stripes, perlin]' --seed 3")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert (code, outputs["held"], summary) == (0, "true", "## Adversarial robustness\n")
    assert [call[0] for call in calls] == ["audit", "report"]
    assert calls[0][1:] == [
        *("runs/my net", "--out", "my out", "--gate", given["gate"]),
        *("--sarif", "my out/audit.sarif", "--junit", "my out/audit.xml", "--minutes", "2.5"),
        *("--set", "controls=[stripes, perlin]", "--seed", "3"),
    ]
    assert outputs["sarif"] == "my out/audit.sarif"
    assert not (tmp_path / "hacked").exists()
    act(**given, data="digits")
    assert json.loads((tmp_path / "calls").read_text().splitlines()[-2])[-4:] == [
        "--data",
        "digits",
        "--suite",
        "quick",
    ]
    monkeypatch.setenv("CODE_audit", "3")
    assert act(**given)[:2] == (3, outputs | {"held": "false"})
    monkeypatch.setenv("CODE_audit", "2")
    assert act(**given)[:3] == (2, {}, "")
    monkeypatch.setenv("CODE_audit", "0")
    monkeypatch.setenv("CODE_compare", "3")
    assert act(**given)[0] == 0
    assert act(**given, baseline="old audit")[:2] == (3, outputs | {"held": "false"})
    assert json.loads((tmp_path / "calls").read_text().splitlines()[-1]) == [
        *("compare", "old audit", "my out", "--gate", "no-regression"),
    ]
    monkeypatch.setenv("CODE_report", "2")
    assert act(**given)[0] == 2


@pytest.mark.full
def test_the_action_judges_a_real_audit(audited, tmp_path):
    act = Act(tmp_path, f'#!/bin/sh\nexec "{sys.executable}" -m gambeson "$@"\n')
    shutil.copytree(audited / "a", tmp_path / "a")  # finished, so that it is only judged
    code, outputs, summary, error = act(
        model=str(audited / "net.safetensors"),
        data="digits",
        suite="quick",
        gate="clean>=0.5, uer<=0.0001",
        out="a",
        options=" ".join(f"'{word}'" for word in SMALL[4:]),
    )
    assert (code, outputs["held"]) == (3, "false"), error
    assert "## Adversarial robustness" in summary
    found = json.loads((tmp_path / outputs["sarif"]).read_text())["runs"][0]["results"]
    assert [one["ruleId"] for one in found if one["level"] == "error"] == ["gate/uer<=0.0001"]
    assert (tmp_path / "a" / "report.html").stat().st_size > 1e5


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("result.json", {"universal": []}, "holds no universal perturbation"),
        ("result.json", {"settings": {"pgd_steps": 3}}, "does not hold the settings universal_steps"),
        ("timing.json", [1], "does not hold the seconds of each stage"),
        ("timing.json", {"clean": "x"}, "does not hold the seconds of each stage"),
    ],
)
def test_damaged_results_are_one_sentence(tmp_path, capsys, file, change, words):
    write_audit(tmp_path / "a", with_jacobian=False)
    path, folder = tmp_path / "a" / file, str(tmp_path / "a")
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | change if isinstance(change, dict) else change))
    says(capsys, ["report", folder, "--junit", str(tmp_path / "b.xml"), "--out", str(tmp_path / "b.html")], words)
    if file == "result.json":
        says(capsys, ["report", folder, "--card", str(tmp_path / "b.md")], words)
        says(capsys, ["compare", folder, folder], words)


def test_a_setting_that_looks_like_a_date_and_is_none_is_named(tmp_path, capsys):
    command = ["audit", "lenet5", "--data", "digits", "--set", "label=2023-02-31", "--out", str(tmp_path / "b")]
    says(capsys, command, "--set label=2023-02-31: '2023-02-31' is not YAML (day is out of range for month)")
