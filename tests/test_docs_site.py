"""The site's pages: every page is found, every link leads somewhere, what they show runs, what they name exists."""

import ast
import functools
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import gambeson as gb

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NEW = (
    "index",
    "concepts",
    "migration",
    "tutorials/engineer",
    "tutorials/red-team",
    "tutorials/researcher",
    "threats",
    "zoo",
)
PAPERS = sorted(page.stem for page in (DOCS / "papers").glob("*.md") if page.stem != "index")
AT_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}


def blocks(page):
    """Return the fenced blocks of a page: language, title, content."""
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(r"^```(\w+)(?: title=\"(.*?)\")?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page):
    """Return the words of every command of a page."""
    return [words for kind, _, code in blocks(page) if kind == "sh" for words in commands_of(code)]


def commands_of(code):
    """Return the words of every command of a block, after ``gambeson``."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("gambeson ")]


@functools.cache
def config():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@functools.cache
def anchors(file):
    """Return the anchors of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", one.lower()).strip()) for one in headings}


def words_of(file):
    """Return a page's text, or what a notebook has in Markdown."""
    if file.suffix != ".ipynb":
        return file.read_text()
    cells = json.loads(file.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def leaves(tree):
    """Return the pages of the navigation."""
    if isinstance(tree, str):
        return [tree]
    return [page for part in (tree.values() if isinstance(tree, dict) else tree) for page in leaves(part)]


def test_every_page_stands_once_in_the_navigation():
    here = {str(file.relative_to(DOCS).with_suffix(".md")) for file in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    assert sorted(leaves(config()["nav"])) == sorted(here | set(AT_ROOT))
    packages = {file.parent.name for file in (ROOT / "src" / "gambeson").glob("*/__init__.py")} - {"cli"}
    assert packages == {file.stem for file in (DOCS / "reference").glob("*.md")} - {"gambeson", "commands"}


def test_every_link_of_every_page_leads_somewhere():
    checked = 0
    root = [ROOT / name for name in ("README.md", *AT_ROOT.values())]
    for file in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *root]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", words_of(file), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = (file.parent / name).resolve() if name else file
            assert target.exists(), f"{file.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{file.name}: {link}"
            checked += 1
    assert checked > 80


def test_the_start_page_is_short_and_shows_one_picture():
    text = (DOCS / "index.md").read_text()
    assert len(text.split()) < 300
    assert text.count("![") == 1


def test_no_page_asks_a_host_for_anything():
    assert config()["theme"]["font"] is False
    assert not any("://" in str(one) for key in ("extra_css", "extra_javascript") for one in config().get(key, []))
    for file in DOCS.rglob("*.md"):
        assert not re.search(r"!\[[^\]]*\]\(http|<(?:img|script|link|iframe)[^>]*http", file.read_text()), file


def test_every_command_of_the_new_pages_has_these_options():
    from typer.main import get_command

    from gambeson.cli.app import app

    count, whole = 0, get_command(app)
    for page in NEW:
        for words in commands(page):
            command, context = whole, None
            while hasattr(command, "commands"):
                context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words, parent=context)  # refuses what it does not have
            count += 1
    assert count > 15


def test_every_name_of_the_library_on_the_pages_exists():
    """``gb.a.b`` in Python blocks, and in the running text in backquotes."""
    found = set()
    for file in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), ROOT / "README.md"]:
        found |= set(re.findall(r"\bgb((?:\.\w+)+)", file.read_text()))
    assert len(found) > 50
    for name in found:
        value = gb
        for part in name.strip(".").split("."):
            assert hasattr(value, part), f"gb{name}"
            value = getattr(value, part)


@pytest.mark.parametrize("page", PAPERS)
def test_what_a_paper_s_page_names_exists_and_says_so(page):
    text = (DOCS / "papers" / f"{page}.md").read_text()
    sections = text.split("## Method")[1].split("## Claims")[0].split("\n### ")[1:]
    assert len(sections) >= 4
    for section in sections:
        codes = re.findall(r"^- Code: `(\S+)`, `(\S+)`: `(.+)`$", section, re.MULTILINE)
        tests = re.findall(r"^- Test: `(\S+?)::(\w+)`$", section, re.MULTILINE)
        assert codes, section
        assert tests, section
        assert len(codes) + len(tests) == section.count("\n- ")
        for path, symbol, line in codes:
            assert line in source_of(path, symbol), f"{path}, {symbol}: {line}"
        for path, name in tests:
            assert source_of(path, name), f"{path}::{name}"


@functools.cache
def source_of(path, symbol):
    """Return the source of ``Class.method`` or a function of a file; empty if it has none."""
    text = (ROOT / path).read_text()
    nodes = ast.parse(text).body
    for name in symbol.split("."):
        node = next((one for one in nodes if getattr(one, "name", None) == name), None)
        if node is None:
            return ""
        nodes = node.body
    return ast.get_source_segment(text, node)


LESS = {"images=100, passes=2": "images=12, passes=1", "steps=50, probe_starts=2": "steps=3, probe_starts=0"}
LESS |= {"steps=40": "steps=10", "queries=100": "queries=5", "8/255": "32/255"}


@pytest.mark.parametrize("less", [LESS, pytest.param({}, marks=pytest.mark.full)], ids=["small", "as it is"])
def test_the_snippets_of_the_migration_run(less, trained, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y = digits.test.take(slice(0, 8 if less else 24))
    scope = {"model": trained, "x": x, "y": y, "data": digits}
    ours = [code for kind, title, code in blocks("migration") if kind == "python" and not title]
    assert len(ours) == 7
    for code in ours[: -1 if less else None]:  # the last is an audit
        for longer, shorter in less.items():
            code = code.replace(longer, shorter)
        exec(compile(code, "migration.md", "exec"), scope)
    assert torch.equal(scope["net"](x), trained(x))
    assert (scope["towards"](trained, x, (y + 1) % 10) - x).abs().max() <= 0.2 + 1e-6
    assert scope["success"].float().mean() > 0.2
    assert scope["robust"].value < gb.evaluation.accuracy(trained, (x, y)).value
    assert (tmp_path / "uap.safetensors").is_file()


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in NEW if page.startswith("tutorials/")])
def test_a_tutorial_runs_as_it_is(page, tmp_path, monkeypatch, capfd):
    from gambeson.cli.app import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    scope = {}
    for kind, title, code in blocks(page):
        if title:
            (tmp_path / title).write_text(code)
        elif kind == "python":
            exec(compile(code, page, "exec"), scope)
        elif kind == "sh":
            for words in commands_of(code):
                assert run(words) == 0, words
    sys.modules.pop("squeezing", None)
    if page.endswith("engineer"):
        plain, hardened = (gb.auditing.AuditResult.load(f"runs/{name}-audit") for name in ("plain", "hardened"))
        assert hardened.middle.uer.high < plain.middle.uer.low
        assert (tmp_path / "runs" / "report.html").is_file()
    elif page.endswith("red-team"):
        assert scope["uap"].about.eps == 0.2
        assert scope["images"].shape == (10, 1, 8, 8)
    else:
        assert scope["audit"].results.checks


@pytest.mark.full
def test_the_start_page_answers_for_a_checkpoint_and_a_folder(tmp_path, monkeypatch, capfd):
    torchvision = pytest.importorskip("torchvision")
    from PIL import Image

    from gambeson.cli.app import run

    draw = torch.Generator().manual_seed(0)
    for number, name in enumerate(("daisy", "rose", "tulip")):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for k in range(60):
            pixels = torch.randint(0, 120, (40, 40, 3), generator=draw, dtype=torch.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels.numpy()).save(tmp_path / "flowers" / name / f"{k}.png")
    plain = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(plain.state_dict(), tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    (code,) = [code for _, title, code in blocks("index") if title]
    (tmp_path / "network.py").write_text("from torchvision.models import resnet18\n" + code.replace(
        "MyNetwork()", "resnet18(num_classes=3)").replace("from my_package import MyNetwork\n", ""))  # fmt: skip
    data = f"image-folder:{tmp_path}/flowers"
    x = torch.rand(2, 3, 40, 40, generator=draw)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for one in ("network.py:build", "torchvision:resnet18@model.pth?normalise=imagenet"):
        model = gb.evaluation.load_model(one, data).model
        assert torch.allclose(model(x), plain((x - mean) / std), atol=1e-4)
    for words in commands("index"):
        words = [word.replace("/data/flowers?size=224", f"{tmp_path}/flowers") for word in words]
        assert run(words) == 0, words
    found = gb.auditing.AuditResult.load("runs/mine")
    assert found.verdict.summary
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_releases_are_tried_with_the_oldest_versions_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    rows = workflow["jobs"]["try"]["strategy"]["matrix"]["include"]
    assert f">={rows[0]['python']}" == project["requires-python"]
    assert (rows[0]["versions"], rows[-1]["versions"]) == ("--lowest", "")
    open_below = [one for one in project["dependencies"] if ">=" not in one]
    assert open_below == [], "without a lower bound the oldest there ever was is tried"
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    for name in re.findall(r"scripts/(\w+\.py)", " ".join(steps)):
        assert (ROOT / "scripts" / name).is_file()


def test_issue_forms_and_the_citation_are_complete():
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert len(forms) == 3
    for file in forms:
        form = yaml.safe_load(file.read_text())
        assert form["name"]
        assert form["description"]
        ids = [part["id"] for part in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(isinstance(one, str) for one in ids), f"{file.name}: {ids}"
        assert all(part["attributes"]["label"] for part in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    told = {re.search(r"\d{4}\.\d{5}", one["identifiers"][0]["value"])[0] for one in citation["references"]}
    pages = " ".join((DOCS / "papers" / f"{page}.md").read_text() for page in PAPERS)
    assert len(told) == len(PAPERS)
    assert told <= set(re.findall(r"\d{4}\.\d{5}", pages))
