"""Rows of the tables of claims: what the studies in ``studies/`` claim, and the verdicts stored in ``results/``."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gambeson.studies import Study
from gambeson.studies.verdicts import interval

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from stored import RESULTS, load  # noqa: E402

PAPERS = {
    "shared-adversarial-training": "S",
    "jacobian-regularization": "J",
    "ensemble-adversarial-training": "E",
    "jacobian-ensembles": "JE",
    "learn2perturb": "L",
}
"""The pages of papers, and what the names of their claims start with."""

SMALL, PRESET = "claims-small", "claims-gambeson"
Rows = list[tuple[str, ...]]


def of_paper(prefix: str) -> tuple[list[str], Rows]:
    """The claims of a paper in every study, and the verdict of each."""
    found = []
    for file in sorted((ROOT / "studies").glob("*.yaml")):
        stored, known = _stored(file.stem), (RESULTS / f"{file.stem}.json").is_file()
        for name, claim in _claims(file):
            if _prefix(name) == prefix:
                told = "; ".join(
                    f"{one['verdict']} (equal {one['at']}{_places(one)})" for one in stored if one["claim"] == name
                )
                source = claim["source"].split("; claim")[0]
                source = "ours" if source.startswith("claim") else source
                found.append(
                    (
                        claim["statement"],
                        source,
                        f"`{file.name}`, `{name}`",
                        told or ("no verdict stored" if known else "not run"),
                    )
                )
    return ["claim", "source", "study", "verdict"], found


def headline() -> tuple[list[str], Rows]:
    """The claims of the small study, with effect and verdict on each of its data sets, at equal steps."""
    verdicts = {one["claim"]: one for one in _stored(SMALL) if one["at"] == "steps"}
    places = list(dict.fromkeys(found["data"] for one in verdicts.values() for found in _run(one)))
    rows = []
    for page, prefix in PAPERS.items():
        for name, claim in _claims(ROOT / "studies" / f"{SMALL}.yaml"):
            if _prefix(name) == prefix and name in verdicts:
                told = {found["data"]: _told(found, claim) for found in verdicts[name]["findings"]}
                statement = f"[{claim['statement'].rstrip('.')}](docs/papers/{page}.md)"
                side = "at_least" if "at_least" in claim else "at_most"
                margin = f"{side.replace('_', ' ')} {_number(claim[side], claim)}{_unit(claim)}"
                rows.append((statement, margin, *(told.get(place, "") for place in places)))
    return ["claim", "margin", *places], rows


def of_preset(row: str, at: str = "steps") -> tuple[list[str], Rows]:
    """A row of the preset beside each single defence, on each of three numbers, at equal steps or at equal time."""
    stored = {one["claim"]: one["findings"] for one in _stored(PRESET) if one["at"] == at}
    rows: dict[str, list[str]] = {}
    for name, claim in _claims(ROOT / "studies" / f"{PRESET}.yaml"):
        if claim["of"]["defense"] != row:
            continue
        told = [_told(found, claim, 1) for found in stored.get(name, [])]
        rows.setdefault(claim["to"]["defense"], []).append("; ".join(told) or "not run")
    return ["beside", "clean accuracy", "eps_uni(0.5)", "attack suite"], [(name, *told) for name, told in rows.items()]


def as_shipped() -> tuple[list[str], Rows]:
    """The preset with its default settings, beside itself and its nearest rival with those that a search chose."""
    metrics = {"clean.accuracy": (100, 1, " %"), "eps.eps_uni": (1, 3, ""), "suite.accuracy": (100, 1, " %")}
    rows: Rows = []
    for study, defense, chosen in (
        ("gambeson-defaults", "gambeson", "as shipped"),
        (PRESET, "gambeson", "searched"),
        (PRESET, "shared-adversarial", "searched"),
    ):
        of = [row for row in load(f"{study}.json")["rows"] if (row["defense"], row["at"]) == (defense, "steps")]
        told = []
        for metric, (scale, digits, unit) in metrics.items():
            values = [scale * row["values"][metric]["value"] for row in of]
            mean, low, high = (
                f"{one:.{digits}f}" for one in (statistics.fmean(values), *(interval(values) or (math.nan, math.nan)))
            )
            told.append(f"{mean}{unit} [{low}, {high}]")
        rows.append((f"{defense}, {chosen}", *told))
    return ["settings", "clean accuracy", "eps_uni(0.5)", "attack suite"], rows


def _claims(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, claim in Study.load(file).claims.items():
        yield name, {key: value for key, value in claim.plain().items() if value is not None}


def _stored(study: str) -> list[dict[str, Any]]:
    return list(load(f"{study}.json").get("claims", [])) if (RESULTS / f"{study}.json").is_file() else []


def _prefix(name: str) -> str:
    return re.split(r"[-\d]", name)[0]


def _run(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for found in verdict["findings"] if found["verdict"] != "not run"]


def _places(verdict: dict[str, Any]) -> str:
    """On which data sets, where they do not agree or not all of them have been run."""
    run = _run(verdict)
    return "".join(f"; {found['data']}: {found['verdict']}" for found in run) if run else ""


def _told(found: dict[str, Any], claim: dict[str, Any], digits: int = 0) -> str:
    if found["effect"] is None:
        return str(found["verdict"])
    effect, low, high = (
        None if found[key] is None else _number(found[key], claim, digits) for key in ("effect", "low", "high")
    )
    return f"{found['verdict']}: {effect}{_unit(claim)}" + ("" if low is None else f" [{low}, {high}]")


def _number(effect: float, claim: dict[str, Any], digits: int = 0) -> str:
    """Format an effect, in points with so many digits."""
    if _unit(claim) == " points":
        return f"{100 * effect:.{digits}f}"
    return f"{effect:.{1 + digits if _unit(claim) else 2}f}"


def _unit(claim: dict[str, Any]) -> str:
    return {"ratio": " times", "correlation": ""}.get(claim.get("how", "difference"), " points")
