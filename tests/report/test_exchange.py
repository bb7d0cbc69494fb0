"""SARIF, JUnit XML and model cards: complete, valid, and the same numbers as the audit's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from report_audits import three, write_audit

from gambeson.auditing import AuditResult
from gambeson.report import Finished, write_card, write_junit, write_sarif

GATES = "uer<=0.7, clean>=0.99, trusted"


def finished(folder: Path, result: AuditResult, gates: str = GATES) -> Finished:
    return Finished(folder, result, result.gate(gates))


def sarif(audits: list[Finished], out: Path) -> list[dict[str, Any]]:
    """The runs of a SARIF file, of which everything that the standard and code scanning require is checked."""
    write_sarif(audits, out)
    log = json.loads(out.read_text())
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    assert len({run["automationDetails"]["id"] for run in log["runs"]}) == len(log["runs"])
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert run["tool"]["driver"]["name"]
        assert all(isinstance(one["executionSuccessful"], bool) for one in run["invocations"])
        assert len({rule["id"] for rule in rules}) == len(rules)
        for rule in rules:
            for text in ("shortDescription", "fullDescription", "help"):
                assert rule[text]["text"].strip()
            assert rule["defaultConfiguration"]["level"] in {"none", "note", "warning", "error"}
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert result["message"]["text"].strip()
            assert result["level"] in {"none", "note", "warning", "error"}
            (place,) = (one["physicalLocation"] for one in result["locations"])
            assert place["region"]["startLine"] >= 1
            assert place["artifactLocation"]["uri"].endswith("result.json")
            assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
        prints = [tuple(result["partialFingerprints"].values()) for result in run["results"]]
        assert len(set(prints)) == len(prints)
    return list(log["runs"])


def test_sarif_holds_what_failed_and_a_rule_for_everything(tmp_path, monkeypatch):
    result = write_audit(tmp_path / "runs" / "my audit", failed=True, with_jacobian=False)
    monkeypatch.chdir(tmp_path)
    (run,) = sarif([finished(Path("runs/my audit"), result)], tmp_path / "out.sarif")
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [
        *("check/deterministic", "check/no-noise-off-gap", "check/no-vanishing-gradients"),
        *("check/crafted-beats-controls", "gate/uer<=0.7", "gate/clean>=0.99", "gate/trusted"),
    ]
    found = {one["ruleId"]: one for one in run["results"]}
    assert list(found) == ["check/no-vanishing-gradients", "gate/clean>=0.99", "gate/trusted"]
    assert [one["level"] for one in found.values()] == ["warning", "error", "error"]
    assert "150 of 200 images have no gradient" in found["check/no-vanishing-gradients"]["message"]["text"]
    assert "0.987 [0.9779, 0.9924], required >= 0.99" in found["gate/clean>=0.99"]["message"]["text"]
    place = found["check/no-vanishing-gradients"]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "runs/my%20audit/result.json"
    lines = Path("runs/my audit/result.json").read_text().splitlines()
    assert lines[place["region"]["startLine"] - 1].strip() == '"name": "no vanishing gradients",'
    assert found["gate/trusted"]["locations"][0]["physicalLocation"]["region"]["startLine"] == 1
    assert (run["properties"]["trusted"], run["properties"]["verdict"]) == (False, result.verdict.summary)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (elsewhere,) = sarif([finished(tmp_path / "runs" / "my audit", result)], tmp_path / "b.sarif")
    uri = elsewhere["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == (tmp_path / "runs" / "my audit" / "result.json").as_uri()


def test_sarif_of_an_audit_without_faults_is_empty(tmp_path):
    result = write_audit(tmp_path, with_jacobian=False)
    (run,) = sarif([Finished(tmp_path, result)], tmp_path / "out.sarif")
    assert run["results"] == []
    assert len(run["tool"]["driver"]["rules"]) == len(result.checks)


def test_several_audits_are_several_runs_and_suites(tmp_path):
    folders, results = three(tmp_path, with_jacobian=False)
    twin = write_audit(tmp_path / "twin", with_jacobian=False)
    audits = [finished(*pair) for pair in zip([*folders, tmp_path / "twin"], [*results, twin], strict=True)]
    runs = sarif(audits, tmp_path / "out.sarif")
    names = ["standard (audit-standard)", "shared-adversarial", "jacobian", "standard (twin)"]
    assert [run["automationDetails"]["id"] for run in runs] == [
        *("gambeson/standard-audit-standard/", "gambeson/shared-adversarial/"),
        *("gambeson/jacobian/", "gambeson/standard-twin/"),
    ]
    write_junit(audits, tmp_path / "out.xml")
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert [suite.get("name") for suite in root] == [f"gambeson audit {name}" for name in names]
    assert root.get("tests") == str(7 * 4)
    assert int(root.get("failures", "")) == len(root.findall(".//failure")) > 0


def test_junit_holds_every_check_and_gate(tmp_path):
    result = write_audit(tmp_path, failed=True, with_jacobian=False)
    write_junit([finished(tmp_path, result)], tmp_path / "out.xml")
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    (suite,) = root
    cases = {case.get("name", ""): case for case in suite.iter("testcase")}
    assert list(cases) == [*(check.name for check in result.checks), "uer<=0.7", "clean>=0.99", "trusted"]
    assert {case.get("classname") for case in cases.values()} == {"standard.checks", "standard.gates"}
    outcomes = {name: [part.tag for part in case] for name, case in cases.items()}
    assert outcomes == {
        "deterministic": [],
        "no noise-off gap": ["skipped"],
        "no vanishing gradients": ["failure"],
        "crafted beats controls": [],
        "uer<=0.7": ["system-out"],
        "clean>=0.99": ["failure"],
        "trusted": ["failure"],
    }
    for element in (root, suite):
        assert [element.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["7", "3", "0", "1"]
    assert cases["no noise-off gap"][0].get("message") == "the model is not random"
    failure = cases["clean>=0.99"][0]
    assert failure.text == "0.987 [0.9779, 0.9924], required >= 0.99"
    assert suite.get("time") == "76.200"  # of timing.json


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        *((one, one) for one in ("<script>&\"'", "]]>", "\ud7ff\ufffe", "")),
        *[("a\x00b\x1b[31m", "a b [31m"), ("a\n\nb", "a b"), ("\udcff a\ud800", "a"), ("a\u2028b", "a b")],
    ],
)
def test_names_that_formats_have_no_room_for(tmp_path, label, kept):
    result = write_audit(tmp_path, label=label, failed=True, with_jacobian=False)
    write_junit([finished(tmp_path, result)], tmp_path / "out.xml")
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert len(suite.findall(".//failure")) == 3
    sarif([finished(tmp_path, result)], tmp_path / "out.sarif")
    for _ in range(2):  # the second time in place of the first
        write_card(result, tmp_path / "card.md")
    head, body = card(tmp_path / "card.md")
    assert head["name"] == kept
    assert "<script>" not in body


def card(path: Path) -> tuple[dict[str, Any], str]:
    """The model index of a card, and its section."""
    opening, head, body = path.read_text().split("---\n", 2)
    assert opening == ""
    (index,) = yaml.safe_load(head)["model-index"]
    return index, body


def test_a_card_holds_every_number_with_its_interval_twice(tmp_path):
    result = write_audit(tmp_path, label="my net", with_jacobian=False)
    index, body = card(write_card(result, tmp_path / "card.md"))
    (found,) = index["results"]
    assert (index["name"], found["task"]["type"]) == ("my net", "image-classification")
    assert found["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    metrics = {one["name"]: one for one in found["metrics"]}
    assert len(metrics) == len(found["metrics"]) == 8
    uer = metrics["error under one perturbation for all images (UER), eps 0.15"]
    assert (uer["type"], uer["value"]) == ("universal_evasion_rate", 0.683)
    assert uer["args"] == {
        **{"attack": "stochastic-pgd", "eps": 0.15, "norm": "inf", "images": 1000},
        **{"seed": 0, "gambeson": "0.1.0", "interval_low": 0.653507, "interval_high": 0.711093},
    }
    assert metrics["accuracy, clean"]["value"] == 0.987
    assert metrics["accuracy under the worst attack per image, eps 0.15"]["args"]["attack"] == "standard"
    for point in result.universal:
        assert f"| {point.uer} of 1,000 | stochastic-pgd, eps {point.eps:.4g}, norm inf |" in body
    assert result.verdict.summary in body
    assert "3 of 3 checks" in body
    for word in ("seed 0", "400 steps from 4 starts", "40 steps from 2 starts", "gambeson 0.1.0", "03b9c41d7e20f6a8"):
        assert word.lower() in body.lower()
    assert "trusted" not in index.__repr__()


def test_a_card_of_numbers_that_cannot_be_trusted_says_so_at_each(tmp_path):
    result = write_audit(tmp_path, failed=True, censored=True, with_jacobian=False)
    index, body = card(write_card(result, tmp_path / "card.md"))
    for metric in index["results"][0]["metrics"]:
        assert metric["name"].endswith("(not to be trusted)") == (metric["name"] != "accuracy, clean")
    assert "Not to be trusted (failed: no vanishing gradients)" in body
    assert "2 of 3 checks" in body
    passed = [check for check in result.checks if check.passed is not False]
    index, _ = card(write_card(result.model_copy(update={"checks": passed}), tmp_path / "card.md"))
    assert index["results"][0]["metrics"][-1]["name"].endswith("(not all checked)")
    assert "no vanishing gradients failed (150 of 200 images have no gradient)" in body
    assert "more than 1" in body
    assert "(more than 1)" in index["results"][0]["metrics"][-1]["name"]


def test_a_card_is_read_by_the_hub_s_own_library(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    write_card(write_audit(tmp_path, with_jacobian=False), tmp_path / "card.md")
    found = hub.ModelCard.load(tmp_path / "card.md").data.eval_results
    assert {one.metric_type for one in found} == {"accuracy", "universal_evasion_rate", "eps_uni"}
    assert {one.dataset_name for one in found} == {"digits"}


def test_audits_of_one_label_and_one_folder_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = {name: write_audit(tmp_path / name, label="net", with_jacobian=False) for name in ("x/audit", "y/audit")}
    audits = [finished(Path(name), result, "uer<=0") for name, result in results.items()]
    audits += [audits[0], finished(Path("x/audit"), write_audit(tmp_path / "z", label="NET", with_jacobian=False))]
    runs = sarif(audits, tmp_path / "a.sarif")
    assert runs[1]["automationDetails"]["id"] == "gambeson/net-y-audit/"
    prints = [one["partialFingerprints"]["gambeson/v1"] for run in runs for one in run["results"]]
    assert len(set(prints)) == len(prints) >= 4
