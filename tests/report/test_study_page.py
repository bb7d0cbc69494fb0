"""The page about a study, as text and in a real browser: sorting, filtering, keyboard, phone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from report_audits import write_audit
from report_reader import Reader
from test_report_browser import CHROMIUM, browser  # noqa: F401

from gambeson import report
from gambeson.cli.app import run
from gambeson.report.charts import hue, symbol
from gambeson.studies import Study
from gambeson.studies.measures import Value
from gambeson.studies.rows import Result, StudyResult
from gambeson.studies.verdicts import verdicts
from tests.conftest import full

NAMES = {"standard": (0.95, 0.60, 0.05), "pgd": (0.85, 0.20, 0.12), "<b>heaps</b>": (0.90, 0.25, 0.20)}


CLAIM = {
    "statement": "Heaps lower the UER.",
    "source": "paper, S1",
    "metric": "uap.uer",
    "of": "<b>heaps</b>",
    "to": "standard",
    "at_most": -0.1,
}
AUDIT = {
    "summary": "One pattern breaks it.",
    "failed": {"no vanishing gradients": "0 of 9"},
    "UER by eps": {"0.1": "60 %"},
}


def near(value: float) -> Value:
    return Value(value=value, low=value - 0.02, high=value + 0.02, n=500)


def made(summary: str = "Three defences.") -> StudyResult:
    settings: dict[str, Any] = {
        "name": "demo",
        "summary": summary,
        "data": [{"name": "digits", "eps": 0.1}, {"name": "mnist5k", "eps": 0.2}],
        "models": ["lenet5"],
        "defenses": dict.fromkeys(NAMES, "standard"),
        "seeds": 2,
        "at": ["steps", "seconds"],
        "reference": "pgd",
        "measures": {
            "clean": {"kind": "accuracy"},
            "uap": {"kind": "attack", "attack": "stochastic-pgd"},
            "eps": {"kind": "eps-uni"},
        },
        "claims": {"H": CLAIM},
    }
    study = Study(**settings)
    rows = []
    for data in ("digits", "mnist5k"):
        for name, (clean, uer, eps) in NAMES.items():
            for at in ("steps", "seconds"):
                for seed in (0, 1):
                    shift = 0.01 * seed + (0.02 if data == "mnist5k" else 0)
                    values = {
                        "clean.accuracy": near(clean - shift),
                        "uap.uer": near(uer + shift),
                        "eps.eps_uni": Value(value=eps, censored=name != "standard"),
                        "train.seconds": Value(value=12.5),
                    }
                    missing = ["eps"] if (name, at) == ("pgd", "seconds") else []
                    rows.append(
                        Result(
                            data=data,
                            model="lenet5",
                            defense=name,
                            at=at,
                            seed=seed,
                            values={k: v for k, v in values.items() if k.partition(".")[0] not in missing},
                            missing=missing,
                            recipe={"epochs": 3, "lr": 0.1},
                            verdicts={"audit": AUDIT},
                            folders={"audit": "cells/abc"},
                            device="cpu",
                            date="2026-01-01",
                        )
                    )
    places = [("digits", "lenet5"), ("mnist5k", "lenet5")]
    return StudyResult(
        study=study.plain(),
        rows=rows,
        claims=verdicts(study.claims, rows, study.at, places),
        cells=60,
        done=56,
        failed={"train of x": "batch size 9 <b>does not fit</b>"},
        environments=[{"device": "a cpu", "torch": "2.0"}],
        date="2026-01-01 10:00",
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_study(made(), tmp_path_factory.mktemp("study") / "page.html")


def test_the_page_has_every_number_and_what_is_not_run(path: Path) -> None:
    html = path.read_text()
    seen = Reader(html)
    assert not [address for address in seen.addresses if address and not address.startswith("data:")]
    assert "56 of 60 cells are done" in seen.text
    assert seen.text.count("Heaps lower the UER. (paper, S1)") == 1
    assert "All in all: reproduced at equal steps; reproduced at equal time." in seen.text
    assert seen.text.count("uap.uer of <b>heaps</b> minus standard: at most -0.1.") == 1
    assert "Models are compared at equal steps, and at equal time." in seen.text
    effects = [row for row in seen.rows if row[0].split()[0] == "H"]
    assert len(effects) == 4
    assert all("-0.35" in row[3] and "reproduced" in row[4] for row in effects)
    standard = next(row for row in seen.rows if row[0].startswith("standard") and "mnist5k" in row[0])
    # The mean of 0.92 and 0.93, and 12.706 times its standard error of 0.005.
    assert standard[1].startswith("92.5 % [86.1, 98.9]")
    assert standard[2].startswith("62.5 %")
    pgd = next(row for row in seen.rows if row[0].startswith("pgd") and "equal time" in row[0])
    assert "not run" in pgd[3]
    assert "> 0.12" in next(row for row in seen.rows if row[0].startswith("pgd"))[3]
    assert "<b>heaps" not in html.replace("\\u003c", "<").split("<table")[1].split("</table>")[0]
    figures = re.findall(r'data-chart="[^"]*">(.*?)</script>', html, re.DOTALL)
    charts = [json.loads(found) for found in figures]
    assert len(charts) == 2 * 2 * 2  # data, equality, and two measures against clean accuracy
    front = charts[0]["data"][0]
    assert (front["x"], front["y"]) == ([84.5, 89.5, 94.5], pytest.approx([20.5, 25.5, 60.5]))
    plain = next(trace for trace in charts[0]["data"] if trace["name"] == "standard")
    assert plain["error_x"]["arrayminus"] == pytest.approx([6.3531], abs=1e-3)
    assert plain["error_x"]["array"] == pytest.approx([5.5])  # no accuracy is above 100 %
    assert plain["error_y"]["array"] == plain["error_y"]["arrayminus"] == pytest.approx([6.3531], abs=1e-3)


def test_where_one_seed_says_something_no_number_of_seeds_is_invented(tmp_path: Path) -> None:
    result = made()
    rows = [row for row in result.rows if row.seed == 0]
    study = Study(**result.study)
    one = result.model_copy(
        update={"rows": rows, "claims": verdicts(study.claims, rows, ["steps"], [("digits", "lenet5")])}
    )
    text = Reader(report.write_study(one, tmp_path / "page.html").read_text()).text
    assert "1 seed; a single seed says something, and an interval takes two" in text
    assert "would decide" not in text


def test_a_row_leads_to_the_page_of_its_audit(tmp_path: Path) -> None:
    result = made()
    result = result.model_copy(update={"rows": result.rows[:1]})
    write_audit(tmp_path / "cells" / "abc" / "audit", label="net 7")
    path = report.write_study(result, tmp_path / "my page.html", tmp_path)
    seen = Reader(path.read_text())
    (address,) = [one for one in seen.addresses if one and not one.startswith("data:")]
    assert address == "my page-audits/audit-standard-digits-lenet5-steps-seed-0.html"
    assert "net 7" in Reader((tmp_path / address).read_text()).text
    assert "gambeson report cells/abc" not in seen.text
    elsewhere = report.write_study(result, tmp_path / "x" / "page.html", tmp_path / "x")
    assert "gambeson report cells/abc/audit" in Reader(elsewhere.read_text()).text


def test_what_has_not_learnt_is_no_point_and_no_two_look_alike(tmp_path: Path) -> None:
    result = made()
    for row in result.rows:
        if row.defense == "pgd":
            row.values["train.learnt"] = Value(value=0)
            row.values["eps.eps_uni"] = Value(value=0.1)
    html = report.write_study(result, tmp_path / "page.html").read_text()
    figure = re.findall(r'data-chart="[^"]*">(.*?)</script>', html, re.DOTALL)[0]
    names = [trace["name"] for trace in json.loads(figure)["data"]]
    assert "pgd" not in names
    assert "standard" in names
    cells = next(row for row in Reader(html).rows if row[0].startswith("pgd"))
    assert cells[3].strip() == "0.1"  # the seeds agree, which is no interval
    looks = {(symbol(k), hue(k)) for k in range(36)}
    assert len(looks) == 36


def test_a_dominated_point_is_not_on_the_front(tmp_path: Path) -> None:
    result = made()
    for row in result.rows:
        if row.defense == "pgd":
            row.values["uap.uer"] = Value(value=0.9)
    html = report.write_study(result, tmp_path / "page.html").read_text()
    front = json.loads(re.findall(r'data-chart="[^"]*">(.*?)</script>', html, re.DOTALL)[0])["data"][0]
    assert front["x"] == [89.5, 94.5]


def visit(browser: Browser, path: Path, width: int) -> tuple[Page, list[str], list[str]]:  # noqa: F811
    page = browser.new_context(offline=True, viewport={"width": width, "height": 800}).new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(120_000)  # busy machines draw slowly
    page.goto(path.as_uri())
    page.wait_for_selector(".main-svg .legendtext")
    return page, complaints, asked


def names(page: Page) -> list[Any]:
    return [
        cell.inner_text().split("\n")[0] for cell in page.locator("#table tbody:not([hidden]) tr:first-child th").all()
    ]


needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")


@needs_browser
def test_rows_are_sorted_filtered_and_opened_by_keyboard(browser: Browser, path: Path) -> None:  # noqa: F811
    page, complaints, asked = visit(browser, path, 1280)
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert len(names(page)) == 6  # equal steps first
    head = page.get_by_role("button", name="UER (uap)")
    head.focus()
    page.keyboard.press("Enter")
    assert [name.split()[-1] for name in names(page)] == [
        "pgd",
        "pgd",
        "<b>heaps</b>",
        "<b>heaps</b>",
        "standard",
        "standard",
    ]
    assert page.locator("#table th[aria-sort=ascending]").inner_text().startswith("UER (uap)")
    page.keyboard.press("Enter")
    assert names(page)[0].endswith("standard")
    assert page.locator("#table th[aria-sort=descending]").count() == 1
    page.select_option("#at", "")
    assert page.locator("#shown").inner_text() == "12 of 12 rows"
    page.get_by_role("button", name="eps_uni (eps)").click()
    assert names(page)[-1].endswith("pgd")  # without a number: last, whichever way it is sorted
    page.check("#down")
    assert names(page)[-1].endswith("pgd")
    page.fill("#filter", "heaps mnist")
    assert len(names(page)) == 2
    page.fill("#filter", "")
    page.select_option("#data", "digits")
    assert page.locator("#shown").inner_text() == "6 of 12 rows"
    opener = page.locator("#table tbody:not([hidden]) .open").first
    opener.focus()
    page.keyboard.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"
    more = page.locator("#table .more:not([hidden])")
    assert more.count() == 1
    assert "One pattern breaks it." in more.inner_text()
    assert "no vanishing gradients" in more.inner_text()
    assert "gambeson report cells/abc/audit" in more.inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#table .more:not([hidden])").count() == 0
    assert complaints == []
    page.context.close()


@needs_browser
@pytest.mark.parametrize("width", [360, full(1280)])
def test_the_study_page_never_scrolls_sideways(browser: Browser, path: Path, width: int) -> None:  # noqa: F811
    page, complaints, _ = visit(browser, path, width)
    page.evaluate("document.querySelectorAll('details').forEach((drawer) => { drawer.open = true; })")
    page.locator("#table .open").first.click()
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 360:
        assert page.locator("#table tbody[hidden]").count() == 6  # at equal time
        assert not any(body.is_visible() for body in page.locator("#table tbody[hidden]").all())
        page.select_option("#sort", label="UER (uap)")  # the headings are out of sight
        assert names(page)[0].endswith("pgd")
        for cell in page.locator("#table tbody:not([hidden]) tr:first-child td").all():
            box = cell.bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
    page.context.close()


def test_a_study_s_file_leads_to_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    study: dict[str, Any] = {
        "kind": "study",
        "name": "tiny",
        "data": [{"name": "digits", "eps": 0.1}],
        "models": ["lenet5"],
    }
    study |= {"defenses": {"standard": "standard"}, "measures": {"clean": {"kind": "accuracy"}}}
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    assert run(["report", "s.yaml"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "runs/studies/tiny has no results of this study: name the folder that they are in, as OUT/tiny" in said
    assert run(["study", "run", "s.yaml", "--minutes", "0"]) == 0
    assert run(["report", "s.yaml"]) == 0
    assert "Study: tiny" in (tmp_path / "runs/studies/tiny/report.html").read_text()
    (tmp_path / "c.yaml").write_text("model: lenet5")
    assert run(["report", "c.yaml"]) == 2
    assert "c.yaml is no study: name the folder" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "net.safetensors").write_bytes(b"x")
    assert run(["report", "net.safetensors"]) == 2
    assert "net.safetensors is a file: name the folder of a finished audit" in " ".join(capsys.readouterr().err.split())
