import importlib.util
import re
from pathlib import Path

import pytest

from gambeson import attacks, defenses

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables(pages):
    return pages.tables()


def test_every_table_is_what_the_code_and_the_stored_results_say(pages, tables):
    for marker, (page, text) in tables.items():
        assert pages.between(page, marker) == text, f"docs/{page} is stale: make tables"


def test_every_marked_table_is_made(tables):
    marked = {*tables, "http settings"}  # the last is held by a test of its own
    for file in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        assert set(re.findall(r"<!-- /(.*?) -->", file.read_text())) <= marked, file


def test_the_tables_of_names_are_those_of_the_registry(pages, tables):
    parts = ("attacks per image", "universal attacks", "defences")
    rows = [row for part in parts for row in tables[part][1].splitlines() if row.startswith("| `")]
    own = {entry.name for registry in (pages.ATTACKS, pages.DEFENSES) for entry in registry.own()}
    names = [*attacks.names("image"), *attacks.names("universal"), *defenses.names()]
    names = [name for name in names if name in own]  # other tests register defences too
    assert len(names) > 40
    assert [row.split("`")[1] for row in rows] == names


def test_claims_of_a_paper_have_the_verdicts_that_are_stored(pages, tmp_path, monkeypatch):
    found = {"data": "digits", "effect": 0.924, "low": None, "high": None, "verdict": "undecided"}
    later = {"data": "mnist", "effect": None, "low": None, "high": None, "verdict": "not run"}
    points = {"data": "digits", "effect": -0.224, "low": -0.31, "high": -0.138, "verdict": "not reproduced"}
    stored = [
        {"claim": "S1-front", "at": "steps", "verdict": "undecided", "findings": [found, later]},
        {"claim": "E-masking", "at": "steps", "verdict": "not reproduced", "findings": [points]},
    ]
    (tmp_path / "claims-small.json").write_text("{}")
    monkeypatch.setattr(pages.claims, "RESULTS", tmp_path)
    monkeypatch.setattr(pages.claims, "load", lambda name: {"claims": stored})
    rows = {f"{row[2].split('`')[1]} {row[2].split('`')[3]}": row[3] for row in pages.claims.of_paper("S")[1]}
    assert rows["claims-small.yaml S1-front"] == "undecided (equal steps; digits: undecided)"
    assert rows["claims-small.yaml S1-factor"] == "no verdict stored"
    assert rows["claims-paper.yaml S1-front"] == "not run"
    assert {file.stem for file in (DOCS / "papers").glob("*.md")} == {*pages.claims.PAPERS, "index"}
    head, (heaps, masking) = pages.claims.headline()
    assert head == ["claim", "margin", "digits"]
    assert heaps[1:] == ("at least 1.0 times", "undecided: 0.9 times")
    assert masking[1:] == ("at least 0 points", "not reproduced: -22 points [-31, -14]")


def test_the_new_idea_of_the_page_trains(digits):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "defenses.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["gb"].evaluation.accuracy(scope["model"], scope["data"]).value > 0.3


def test_costs_in_the_table_are_what_is_counted(trained, digits):
    from gambeson.victim import Victim

    x, y = digits.test.take(slice(0, 10))
    for name, forwards, backwards in [
        ("fgsm", 1, 1),
        ("r-fgsm", 1, 1),
        ("i-fgsm", 10, 10),
        ("step-ll", 2, 1),
        ("mi-fgsm", 10, 10),
        ("si-ni-fgsm", 50, 50),
    ]:
        with Victim(trained) as victim:
            attacks.create(name, eps=0.01)(victim, x, y)
        assert (victim.forwards, victim.backwards) == (10 * forwards, 10 * backwards), name


def test_the_server_of_the_page_answers_the_client():
    import http.server
    import threading

    import torch

    from gambeson.models.black_box.http import HttpModel

    code, adapter = re.findall(r"```python\n(.*?)```", (DOCS / "black-box.md").read_text(), re.DOTALL)
    begun = []

    class Once(http.server.ThreadingHTTPServer):
        def serve_forever(self, *_):
            threading.Thread(target=super().serve_forever, args=(0.02,), daemon=True).start()
            begun.append(self)

    scope = {"model": lambda images: images.flatten(1)[:, :4] * 3}
    code = code.replace("ThreadingHTTPServer((", "Once((").replace("8000", "0")
    exec(code, scope | {"Once": Once})
    images = torch.rand(70, 1, 5, 5)
    try:
        found = HttpModel(f"http://127.0.0.1:{begun[0].server_port}")(images)
    finally:
        begun[0].shutdown()
        begun[0].server_close()
    assert torch.equal(found, scope["model"](images))
    seen: dict = {"predict": lambda pixels: pixels.shape + (pixels.dtype.name, int(pixels[0, 1, 2, 0]))}
    exec(adapter, seen)
    assert seen["ask"](images) == (70, 5, 5, 1, "uint8", round(float(images[0, 0, 1, 2]) * 255))


def test_the_settings_of_http_are_those_of_the_page():
    from gambeson.models.black_box.http import HttpSettings

    rows = [
        f"| `{name}` | {field.get_default(call_default_factory=True)} | "
        f"{' '.join((field.description or '').split()).replace('``', '`')} |"
        for name, field in HttpSettings.model_fields.items()
    ]
    text = (DOCS / "black-box.md").read_text()
    written = text.split("<!-- http settings -->\n")[1].split("<!-- /http settings -->")[0].splitlines()[2:]
    assert written == rows
