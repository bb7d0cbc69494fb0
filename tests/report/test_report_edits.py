"""Edits and classes in the page: every rate in its cell, the chart's numbers, and neither where an audit has none."""

from __future__ import annotations

import json
import re
from pathlib import Path

from report_audits import by_class, three, write_audit
from report_reader import Reader

from gambeson import report
from gambeson.auditing import AuditResult
from gambeson.evaluation import EditsResult, Rate


def edited(result: AuditResult) -> EditsResult:
    assert result.edits
    return result.edits


def said(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def test_every_edit_stands_in_its_cell_and_in_the_chart(tmp_path: Path) -> None:
    folders, results = three(tmp_path)
    html = report.write(folders, tmp_path / "page.html").read_text()
    seen = Reader(html)
    start = next(k for k, row in enumerate(seen.rows) if row[0] == "Edit")
    for line, edit in enumerate(("none", "jpeg:75", "resize:0.5", "shift:1"), 1):
        row = seen.rows[start + line]
        assert row[0].startswith(edit)
        for cell, result in zip(row[1:], results, strict=True):
            one = next(one for one in edited(result).rates if one.edit == edit)
            assert one.control
            clean, worst = (f"{100 * rate.value:.1f} %" for rate in (one.clean, one.control))
            assert cell == f"{said(one.uer)} clean {clean} strongest control {worst}"
    assert "colour:0.1 was left out: images of one channel have no colours." in seen.text
    found = re.search(r'data-chart="edited">(.*?)</script>', html, re.S)
    assert found
    traces = json.loads(found[1])["data"]
    assert [trace["meta"] for trace in traces] == ["strongest control", "clean error", "UER"] * 3
    for result, drawn in zip(results, [traces[k : k + 3] for k in (0, 3, 6)], strict=True):
        for trace, field in zip(drawn, ("control", "clean", "uer"), strict=True):
            assert trace["x"] == ["none", "jpeg:75", "resize:0.5", "shift:1"]
            assert trace["y"] == [100 * getattr(one, field).value for one in edited(result).rates]
        assert drawn[2]["error_y"]["array"] == [100 * (o.uer.high - o.uer.value) for o in edited(result).rates]
        least = min(edited(result).rates, key=lambda one: one.harm.value)
        first = f"{result.subject.label} from {edited(result).rates[0].uer} without an edit"
        assert f"{first}; shift:1 leaves least, {least.uer}" in seen.text


def test_classes_are_listed_from_the_worst_and_areas_where_there_are_two(tmp_path: Path) -> None:
    names = [f"kind {k}" for k in range(25)]
    result = write_audit(tmp_path / "a", classes=names)
    seen = Reader(report.write([tmp_path / "a"], tmp_path / "page.html").read_text())
    start = next(k for k, row in enumerate(seen.rows) if row[0] == "Class")
    assert result.classes
    rates = sorted(result.classes.classes, key=lambda one: -one.uer.value)[:20]
    for row, one in zip(seen.rows[start + 1 : start + 21], rates, strict=True):
        assert row == [one.name, f"{said(one.uer)} clean {100 * one.clean.value:.1f} %"]
    assert "The 20 of 25 classes with the highest error." in seen.text
    assert "Area under the ROC curve" not in seen.text
    view = by_class(0.15, "inf", ["cat", "dog"], 0)
    result.model_copy(update={"classes": view}).save(tmp_path / "a")
    seen = Reader(report.write([tmp_path / "a"], tmp_path / "two.html").read_text())
    start = next(k for k, row in enumerate(seen.rows) if row[0] == "AUC")
    assert view.auc
    assert [row[1] for row in seen.rows[start + 1 : start + 3]] == [said(view.auc.clean), said(view.auc.perturbed)]
    own = view.classes[1].own
    assert own
    assert f"with its own pattern {said(own)}" in seen.text


def test_audits_without_edits_leave_the_sections_out(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "a")
    page = report.write([tmp_path / "a"], tmp_path / "page.html").read_text()
    assert 'id="edits"' in page
    assert 'id="classes"' in page
    result.model_copy(update={"edits": None, "classes": None}).save(tmp_path / "a")
    page = report.write([tmp_path / "a"], tmp_path / "page.html").read_text()
    assert 'id="edits"' not in page
    assert 'id="classes"' not in page
