"""The notebooks: stored as one run left them, and small; they run, in the full tests in kernels of their own."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("engineer", "red-team", "researcher")


def cells(name):
    """Return the code cells: source, tags, outputs, number of the execution."""
    read = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (read["nbformat"], read["metadata"]["language_info"]) == (4, {"name": "python"})
    assert len({cell["id"] for cell in read["cells"]}) == len(read["cells"])
    return [cell for cell in read["cells"] if cell["cell_type"] == "code"]


def shown(name):
    """Return what a notebook has printed."""
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    return "".join("".join(output.get("text") or output["data"]["text/plain"]) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_as_one_run_left_it(name):
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    content, code = (FOLDER / f"{name}.ipynb").read_text(), cells(name)
    assert len(content) < 200_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 1
    assert not re.search(r"/(?:home|root|tmp|work|Users)/|iopub", content)
    for cell in code:
        ast.parse("".join(cell["source"]))


def test_what_the_notebooks_say_is_what_they_show():
    told = shown("engineer")
    assert "original 1 of 2 gates missed" in told
    assert "\nhardened All gates held" in told
    rates = {
        one[0].strip(): one[1:]
        for one in re.findall(r"(.{18}) UER ([\d.]+) % \[([\d.]+), ([\d.]+)\]", shown("red-team"))
    }
    assert float(rates["from the stand-in"][1]) > float(rates["random-sign"][2])
    told = shown("researcher")
    for net, eps in (("standard", 0.2), ("standard", 0.3), ("universal", 0.2), ("universal", 0.3)):
        ours, theirs = (
            re.search(rf"{net} +eps {eps}: {one} +UER (.*)", told)[1] for one in ("Coarse", "StochasticPGD")
        )
        assert max(means(ours)) < min(means(theirs))
    for edit in ("resize:0.5", "blur:1"):
        lost = []
        for attack in ("Coarse", "StochasticPGD"):
            before, after = (
                means(re.search(rf"{attack} +{one} +UER (.*), clean", told)[1])[0] for one in ("none", edit)
            )
            lost.append(before - after)
        assert lost[0] > lost[1] + 5


def means(text):
    """Return the rates of a text, without their intervals."""
    return [float(one) for one in re.findall(r"([\d.]+) % \[", text)]


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_site_describes_every_command(hooks):
    assert hooks.COMMANDS in (ROOT / "docs" / "reference" / "commands.md").read_text()
    headings = re.findall(r"^#+ `gambeson (.*)`$", hooks.commands(), re.MULTILINE)
    assert headings[0] == "quickstart"
    assert {"audit", "study run", "testbed score", "uap craft"} <= set(headings)


def test_the_site_shows_a_notebook_with_its_picture(hooks):
    text, pictures = hooks.page_of(FOLDER / "red-team.ipynb")
    ((name, picture),) = pictures.items()
    assert f"]({name})" in text
    assert picture.startswith(b"\x89PNG")
    assert text.startswith("# Nothing but a prediction function\n\n[Download this notebook](red-team.ipynb)")
    assert "```text\nclean accuracy" in text


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_kernel_of_its_own(name, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    spec = importlib.util.spec_from_file_location("docs_notebooks", ROOT / "docs" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    found = [cell for cell in module.executed(FOLDER / f"{name}.ipynb").cells if cell.cell_type == "code"]
    for stored, cell in zip(cells(name), found, strict=True):
        kinds = [[one["output_type"], sorted(one.get("data", ()))] for one in stored["outputs"]]
        assert [[one["output_type"], sorted(one.get("data", ()))] for one in cell.outputs] == kinds
