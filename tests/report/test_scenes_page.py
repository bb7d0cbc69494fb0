"""The page about a segmentation model: what it says, its pictures, and the slider over eps in a real browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from report_audits import write_audit
from report_reader import Reader
from report_scenes import CLASSES, KEPT, SIDE, write_scenes
from test_report_browser import CHROMIUM, QUIET

from gambeson import report
from gambeson.report.scenes import PALETTE, UNLABELLED, colour
from tests.conftest import full

EPS = 5


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root / "audit")
    return report.write([root / "audit"], root / "page.html")


def pixels(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))


def test_the_answer_is_about_pixels_and_classes(page: Path) -> None:
    found = Reader(page.read_text())
    assert "makes this model wrong on 68 of 100 pixels; without it, on 1 ." in found.text
    assert "mean IoU) is 30 of 100 with it and 60 without." in found.text
    assert "brings its error to 50 of 100 pixels or more" in found.text
    cells = {row[0].split("  ")[0].strip(): row[1:] for row in found.rows}
    order = [name for name in cells if name in CLASSES]
    assert order == ["ground", "tree"]  # that of the data; a class without a pixel has no IoU
    assert [cell.split(" %")[0].strip() for cell in cells["ground"]] == ["78.0", "71.0", "66.0", "61.0", "56.0", "51.0"]
    assert (
        "83 of 100 pixels are taken for the target, 61 without the pattern and 64 for other scenes' maps." in found.text
    )
    assert "57 of 100 of its pixels are hidden, and 88 of 100 others are kept." in found.text
    assert "test images misclassified" not in found.text


def test_masks_have_the_colours_of_the_legend_and_say_what_is_in_them(page: Path) -> None:
    html = page.read_text()
    found = Reader(html)
    truth = next(alt for alt in found.pictures if alt.startswith("Truth of image 1"))
    assert truth.replace("\N{NO-BREAK SPACE}", " ") == "Truth of image 1: ground 50 %, road <b> 25 %, tree 25 %"
    drawn = pixels(found.pictures[truth])
    assert drawn.shape == (SIDE, SIDE, 3)
    shown = ["#" + "".join(f"{value:02x}" for value in drawn[y, x]) for y, x in ((0, 5), (9, 5), (17, 5), (9, 0))]
    assert shown == [PALETTE[0], PALETTE[1], PALETTE[2], UNLABELLED]
    for k, name in enumerate(CLASSES):
        escaped = name.replace("<", "&lt;").replace(">", "&gt;")
        assert f'<i style="background: {colour(k)}"></i>{escaped}</li>' in html
    assert len({colour(k) for k in range(40)}) == 40
    assert found.text.count("of 100 wrong") == KEPT * (1 + EPS) + 2 * 4
    assert found.text.count("of 100 as aimed") == 2 * 4
    assert "<b>0</b> of 100 wrong" in html  # clean
    assert 'class="wrong">25</b> of 100 wrong' in html  # eight rows of 32 under the last pattern
    assert all(address.startswith(("data:", "#")) for address in found.addresses)


def test_a_page_about_images_has_no_scenes(tmp_path: Path) -> None:
    write_audit(tmp_path / "audit", with_jacobian=False)
    html = report.write([tmp_path / "audit"], tmp_path / "page.html").read_text()
    assert "data-scenes" not in html.partition("<body>")[2]
    assert "IoU" not in html.partition("<body>")[2].partition("Plotly")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield chromium
        chromium.close()


def visible(page: Page, what: str) -> list[str]:
    shown = page.locator(f"[data-scenes] >> nth=0 >> {what} >> visible=true").all_text_contents()
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in shown]


@pytest.mark.parametrize("width", [360, full(1200)])
def test_the_slider_goes_through_the_patterns_by_keyboard(browser: Browser, page: Path, width: int) -> None:
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
    shown, complaints, asked = context.new_page(), [], []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    slider = shown.get_by_label("Strength of the pattern")
    assert slider.input_value() == "2"
    assert visible(shown, ".told p") == ["eps 12/255: wrong on 68 of 100 pixels, mean IoU 30.0 %"]
    assert shown.locator("[data-scenes] >> nth=0 >> .frame >> visible=true").count() == KEPT
    slider.focus()
    slider.press("ArrowRight")
    (said,) = visible(shown, ".told p")
    assert said.startswith("eps 16/255: wrong on 81 of 100 pixels")
    assert (slider.get_attribute("aria-valuetext") or "").replace("\N{NO-BREAK SPACE}", " ") == said
    assert shown.locator("[data-scenes] >> nth=0 >> .frame >> visible=true").count() == KEPT
    assert "eps 16/255" in visible(shown, ".frame figcaption")[0]
    slider.press("Home")
    assert visible(shown, ".told p")[0].startswith("eps 4/255")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    pictures = shown.locator(".scene >> nth=0 >> figure >> visible=true")
    boxes = [pictures.nth(k).locator("img, svg").bounding_box() for k in range(pictures.count())]
    assert len(boxes) == 6
    assert all(box and abs(box["width"] - box["height"]) < 1 for box in boxes)  # in their own proportion
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    context.close()


def test_without_scripts_all_patterns_stand_below_each_other(browser: Browser, page: Path) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    shown = context.new_page()
    shown.goto(page.as_uri())
    assert shown.locator("[data-scenes] >> nth=0 >> .frame >> visible=true").count() == KEPT * EPS
    assert not shown.get_by_label("Strength of the pattern").is_visible()
    tops = [box["y"] for k in range(EPS) if (box := shown.locator(".frame").nth(k).bounding_box())]
    assert tops == sorted(tops)
    assert len(set(tops)) == EPS
    context.close()
