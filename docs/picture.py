"""Make the README's pictures from the quickstart's report: ``make picture``."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
REPORT = HERE.parent / "runs" / "quickstart" / "report.html"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def main() -> None:
    """Photograph the answer about each model and the curve."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1140, "height": 900}, device_scale_factor=1.5)
        page.goto(REPORT.as_uri())
        page.wait_for_selector("#chart svg")
        for name, part in (("answer", ".cards"), ("curve", "#curve")):
            page.locator(part).screenshot(path=HERE / f"quickstart-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
