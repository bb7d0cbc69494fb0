"""The pages about the audit say what the code says: generated parts, pictures, tables of settings and fields."""

import importlib.util
import json
import re
import struct
from pathlib import Path

import pytest
import torch

from gambeson.auditing import DIAGNOSTICS, AuditResult, Suite

ROOT = Path(__file__).parent.parent
PAGE, SUITES_PAGE, CHECKS, TESTBED = (
    (ROOT / "docs" / name).read_text() for name in ("audit.md", "suites.md", "checks.md", "testbed.md")
)
PICTURES = ROOT / "docs" / "audit"


def _page(name="audit_page"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page():
    return _page()


def _between(mark, page=PAGE):
    return page.split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]


def test_the_sections_are_those_of_the_diagnostics():
    assert re.findall(r"^## (.*)$", _between("diagnostics", CHECKS), re.MULTILINE) == [one.name for one in DIAGNOSTICS]


def _cell(name, failed=(), broken=False, per_image=0.9, kind="obfuscated"):
    rate = {"value": per_image, "low": per_image - 0.05, "high": per_image + 0.05, "n": 100}
    row = {"name": name, "data": "digits", "kind": kind, "failed": list(failed), "trusted": not failed}
    return row | {"broken": {"per image": broken}, "per_image": rate}


def test_overstated_models_are_counted_by_library_and_kind_where_their_truth_is_known(tmp_path):
    names = ["four grey levels", "comparator", "hedge", "dead zone"]
    low = {"value": 0.1, "low": 0.05, "high": 0.2, "n": 100}
    truth = {"eps": 0.15, "clean": low, "accuracy": low, "uer": low, "how": ""}
    cells = [_cell(names[0]), _cell(names[1], per_image=0.15), _cell(names[2], failed=["x"]), _cell(names[3])]
    cells += [_cell("standard", kind="honest"), _cell("linear", ["x"], kind="honest")]
    path = tmp_path / "testbed.json"
    content = {"suites": {}, "auditors": {"foolbox": {"cells": {row["name"]: row for row in cells}}}}
    path.write_text(json.dumps(content | {"truths": {f"digits/{name}": truth for name in names[:3]}}))
    (line,) = (line for line in _page("testbed_rates").text(path).splitlines() if line.startswith("| foolbox"))
    assert [cell.split(" [")[0].strip() for cell in line.split("|")[2:-1]] == [
        "100.0 %",
        "0.0 %",
        "0.0 %",
        "33.3 %",
        "50.0 %",
    ]


def test_a_kind_is_found_by_the_checks_of_other_kinds_alone():
    rows = [
        _cell("four grey levels", ["a", "b"]),
        _cell("comparator", ["a"]),
        _cell("hedge", ["b", "noisy"]),
        _cell("hidden pixels", ["noisy"]),
        _cell("slow drift of scale", ["c"]),
        _cell("dead zone", broken=True),
        _cell("standard", ["noisy"], kind="honest"),
    ]
    found = _page("testbed_rates").folds(rows)
    assert found == {
        "preprocessing": (1, 1, 1, 1),
        "logits": (1, 1, 1, 0),  # b alone finds what the others need
        "adaptive": (1, 1, 1, 0),
        "false gradient": (1, 0, 0, 0),  # its only check accuses an honest model
        "state": (1, 1, 0, 0),  # nobody else calls for its check
    }


@pytest.mark.full
def test_the_testbeds_page_runs(tmp_path, monkeypatch, capsys):
    from gambeson.testbed.recipes import networks

    for room in ("recipes", "truth"):
        monkeypatch.setattr(f"gambeson.testbed.{room}.data_root", lambda _: tmp_path)
    networks.cache_clear()
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", TESTBED, re.DOTALL):
        exec(code, scope)
    networks.cache_clear()
    found = scope["score"]
    assert [outcome.name for outcome in found.outcomes if not outcome.judgement.trusted] == FLAT
    assert not found.accused.value
    assert capsys.readouterr().out.count("%") == 6


FLAT = ["four grey levels", "logits x 1e4"]
"""Models of the page's example in which most images have no gradient."""


def test_error_rates_are_told_from_what_is_stored(page, tmp_path, monkeypatch):
    rate = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 4}
    cells = {
        "a": {"kind": "obfuscated", "failed": ["no EOT gap"]},
        "b": {"kind": "obfuscated", "failed": [], "passed": ["no EOT gap", "stateless"]},
        "c": {"kind": "honest", "failed": [], "passed": ["no EOT gap"]},
        "d": {"kind": "honest", "failed": []},
    }
    keys = list(page._WRONG.values())
    found = {
        keys[0]: rate | {"models": ["b on digits"]},
        keys[1]: rate | {"models": []},
        keys[2]: rate | {"models": []},
    }
    path = tmp_path / "testbed.json"
    monkeypatch.setattr(page, "RATES", path)
    assert "Not measured yet" in page.rates_text()
    alone = {
        "cells": {"a": cells["a"], "c": cells["c"]},
        keys[0]: rate | {"models": []},
        keys[1]: rate | {"models": []},
    }
    alone[keys[2]] = rate | {"models": [], "n": 1}
    suites = {"quick": {"cells": cells, **found}, "quick, first sight": alone}
    path.write_text(json.dumps({"suites": suites}))
    text = page.rates_text()
    assert text.count("first sight | honest") == 0
    assert "| quick | obfuscated, trusted and not broken | 25.0 % [10.0, 50.0] of 4 | b on digits |" in text
    assert "| fails | obfuscated, quick | honest, quick |\n" in text  # a single network is no rate
    assert "| no EOT gap | 1 of 2 | 0 of 1 |" in text  # of those that it applied to
    assert "| stateless | 0 of 1 |  |" in text


def test_every_picture_of_a_diagnostic_has_its_words(page):
    names = [one.name for one in DIAGNOSTICS if one.name != page.WITHOUT]
    assert sorted(page.CAPTIONS) == sorted(names)
    assert {path.name for path in PICTURES.iterdir()} == {page.file_of(name) for name in names}
    for name in names:
        assert f'<img src="audit/{page.file_of(name)}"' in CHECKS, name
        content = (PICTURES / page.file_of(name)).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n", name
        assert len(content) < 60_000, name
        assert struct.unpack(">II", content[16:24]) == (1280, 520), name


def test_the_pictures_were_drawn_of_a_model_that_fails_and_one_that_passes(page):
    stored = json.loads((ROOT / "results" / "audit-pictures.json").read_text())
    assert sorted(stored) == sorted(page.CAPTIONS)
    for name, entry in stored.items():
        assert (entry["fails"]["passed"], entry["passes"]["passed"]) == (False, True), name
        assert entry["fails"]["panel"]["kind"] == entry["passes"]["panel"]["kind"], name


def test_the_fields_are_those_of_the_schema():
    told = PAGE.split("`result.json` is one flat record:")[1].split("Every rate is")[0]
    told = re.sub(r"\([^()]*\)", "", told)
    assert set(re.findall(r"`(\w+)`", told)) | {"schema_", "seed"} == set(AuditResult.model_fields)


def test_the_power_of_the_checks_is_what_is_computed():
    from gambeson.auditing import SUITES
    from gambeson.auditing.outcome import COMPARISONS, smallest_effect

    sample, limits = SUITES["quick"].sample, (0, 0.01, 0.02, 0.05)
    for words, looks in (
        ("the sample alone", (sample,)),
        ("the sample, then five times as many", (sample, 5 * sample)),
    ):
        effects = " | ".join(f"{100 * smallest_effect(looks, limit):.1f} %" for limit in limits)
        assert f"| {words} | {effects} |" in CHECKS
    assert f"at most {COMPARISONS} comparisons" in CHECKS
    assert f"at the level 0.05 / {COMPARISONS} " in CHECKS


def test_the_costs_are_those_of_the_suites(page):
    assert _between("costs", SUITES_PAGE) == page.costs_text(), "run: python benchmarks/audit_page.py"


def test_the_strength_is_that_stored_and_holds(page):
    assert _between("strength", SUITES_PAGE) == page.strength_text(), "run: python benchmarks/audit_page.py"
    stored = json.loads(page.STRENGTH.read_text())["summary"]
    assert len(stored["rows"]) == 10
    for found in stored["rows"].values():
        assert found["reference"] <= found["autoattack"]
        assert found["quick"]["above"] <= 0.015 + 1e-9
    assert stored["worst"]["quick"]["cost"] < 1 / 3


def test_the_cost_of_a_universal_perturbation_is_what_is_counted(page, trained, digits, monkeypatch):
    from gambeson.victim import Victim

    small = {"universal_steps": 125, "universal_batch": 8, "universal_probe_starts": 1, "universal_restarts": 1}
    suite = Suite(eps=(0.1,), **small)
    monkeypatch.setattr(page, "SUITES", {"small": suite})
    attack = suite.universal(0.1)
    counted = []
    for start in (None, torch.full((1, *digits.train.shape), 0.05)):
        with Victim(trained) as victim:
            attack.craft(victim, digits, start=start)
            counted.append(round(victim.backwards, -3))
    assert f"| universal, per eps | {counted[0]:,} to {counted[1]:,} |" in page.costs_text()
