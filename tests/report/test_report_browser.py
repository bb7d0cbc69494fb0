"""The page in a real browser, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from report_audits import three, transferred, write_audit
from report_reader import Written

from gambeson import report
from tests.conftest import full, quickly

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield chromium
        chromium.close()


def visit(browser: Browser, path: Path, width: int) -> tuple[Page, list[str], list[str]]:
    """Open a page offline; return it with its complaints and everything it asked for."""
    page = browser.new_context(offline=True, viewport={"width": width, "height": 800}).new_page()
    complaints: list[str] = []
    asked: list[str] = []

    def dismiss(dialog: Any) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", dismiss)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#chart .main-svg .legendtext")
    return page, complaints, asked


def test_chart_is_drawn_without_a_network(browser: Browser, written: Written) -> None:
    page, complaints, asked = visit(browser, written.path, 1280)
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [written.path.as_uri()]
    assert page.locator("#chart .scatterlayer .trace").count() == 3 * 4
    assert page.locator("#chart .js-fill").count() == 3
    assert page.locator("#chart .scatterlayer .point").count() == 3 * 6
    assert page.locator("#chart .legendtext").all_text_contents() == [r.subject.label for r in written.results]
    assert page.locator("#chart").get_attribute("aria-label")
    assert page.locator(".modebar-btn--logo, a[href*=plotly]").count() == 0
    page.context.close()


def overlaps(page: Page, one: str, other: str) -> bool:
    first, second = page.locator(one).first.bounding_box(), page.locator(other).first.bounding_box()
    assert first
    assert second
    return first["y"] + first["height"] > second["y"] + 1 and second["y"] + second["height"] > first["y"] + 1


CELLS = """Array.from(document.querySelectorAll("td"), (node) => {
  const box = node.getBoundingClientRect();
  return [box.left, box.right, getComputedStyle(node, "::before").content];
})"""


@pytest.mark.parametrize("width", [360, full(768), full(1280)])
@pytest.mark.parametrize("colour", quickly([False, True], True))
def test_page_never_scrolls_sideways(browser: Browser, tmp_path: Path, width: int, colour: bool) -> None:
    folders, _ = three(tmp_path, colour=colour)
    page, complaints, _ = visit(browser, report.write(folders, tmp_path / "page.html"), width)
    page.evaluate("document.querySelectorAll('details').forEach((drawer) => { drawer.open = true; })")
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not overlaps(page, "#chart .xtitle", "#chart .legend")
    title, chart = page.locator("#chart .xtitle").bounding_box(), page.locator("#chart").bounding_box()
    assert title
    assert chart
    assert title["x"] >= chart["x"]
    assert title["x"] + title["width"] <= chart["x"] + chart["width"]
    assert not overlaps(page, "#chart .xtitle", "#chart .xaxislayer-above")
    if width == 360:
        cells = page.evaluate(CELLS)  # no cell lies outside the screen, and each says what it is
        assert len(cells) > 20
        for left, right, name in cells:
            assert 0 <= left < right <= width
            assert name not in ("none", '""')
    page.context.close()


def test_a_hostile_label_does_nothing(browser: Browser, tmp_path: Path) -> None:
    label = "<script>alert(1)</script><b>&amp;<img src=x onerror=alert(2)>"
    write_audit(tmp_path / "a", label=label)
    page, complaints, _ = visit(browser, report.write([tmp_path / "a"], tmp_path / "page.html"), 1280)
    assert complaints == []
    assert page.locator("h2").first.text_content() == label
    assert page.locator(".badge").all_text_contents() == ["✗ broken", "✓ measurement checked"]
    assert page.locator("#chart .legendtext").text_content() == label
    page.context.close()


def test_paper_shows_everything(browser: Browser, written: Written) -> None:
    page, complaints, _ = visit(browser, written.path, 1280)
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF")
    assert len(paper) > 50_000
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every((drawer) => drawer.open)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    for table in page.locator("table").all():
        assert table.evaluate("(node) => node.getBoundingClientRect().right") <= 688
    assert complaints == []
    page.context.close()


@pytest.mark.parametrize("width", [390, full(1200)])
def test_mathematics_is_folded_and_drawn_at_full_width_when_opened(
    browser: Browser, written: Written, width: int
) -> None:
    page, _, _ = visit(browser, written.path, width)
    chart, drawer = page.locator("#along .main-svg").first, page.locator("#jacobian > details")
    assert not chart.is_visible()
    drawer.evaluate("(node) => { node.open = true; }")
    width_of = "document.querySelector('{}').getBoundingClientRect().width".format
    drawn, room = width_of("#along .main-svg"), width_of("#along")
    page.wait_for_function(f"{room} > 100 && Math.abs({drawn} - {room}) <= 2")  # drawn anew, once it has room
    page.context.close()


@pytest.mark.parametrize("width", [390, 1200])
def test_the_transfer_page_never_scrolls_sideways(browser: Browser, tmp_path: Path, width: int) -> None:
    page = browser.new_context(offline=True, viewport={"width": width, "height": 800}).new_page()
    page.goto(report.write_transfer(transferred(), tmp_path / "transfer.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("td.own").count() == 2 * 2
    page.context.close()
