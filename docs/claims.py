"""Rows of the tables of claims: what the studies in ``studies/`` claim, and the verdicts stored in ``results/``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gambeson.studies import Study

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

SMALL = "claims-small"
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


def _told(found: dict[str, Any], claim: dict[str, Any]) -> str:
    if found["effect"] is None:
        return str(found["verdict"])
    interval = "" if found["low"] is None else f" [{_number(found['low'], claim)}, {_number(found['high'], claim)}]"
    return f"{found['verdict']}: {_number(found['effect'], claim)}{_unit(claim)}{interval}"


def _number(effect: float, claim: dict[str, Any]) -> str:
    return f"{100 * effect:.0f}" if _unit(claim) == " points" else f"{effect:.1f}" if _unit(claim) else f"{effect:.2f}"


def _unit(claim: dict[str, Any]) -> str:
    return {"ratio": " times", "correlation": ""}.get(claim.get("how", "difference"), " points")
