"""The table of error rates by auditor, library and kind, from ``results/testbed.json`` alone.

``python benchmarks/testbed_rates.py`` writes it into ``docs/testbed.md``; a test holds the page against it. An
obfuscated model is *overstated* where the auditor trusts it and reports a number clearly better than the ground truth
(the intervals do not meet), or trusts it and reports none. A model whose truth is not stored is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gambeson import testbed
from gambeson.evaluation import Rate
from gambeson.testbed.judgement import Judgement, overstates
from gambeson.testbed.truth import GroundTruth

ROOT = Path(__file__).parent.parent
RATES, PAGE = ROOT / "results" / "testbed.json", ROOT / "docs" / "testbed.md"
ENTRIES = {entry.name: entry for entry in testbed.models("digits")}
LIBRARIES = ("first", "second", "third")
Row = dict[str, Any]


def overstated(row: Row, truth: dict[str, Any]) -> bool:
    """Whether an auditor calls an obfuscated model more robust than it is, without a word."""
    uer, accuracy = (Rate(**row[key]) if key in row else None for key in ("uer", "per_image"))
    return overstates(Judgement(trusted=row["trusted"], uer=uer, accuracy=accuracy), GroundTruth(**truth))


def judged(content: dict[str, Any]) -> dict[str, list[tuple[Row, bool]]]:
    """Return, for each auditor, its rows of models that can be counted, and whether each is wrong."""
    truths, found = content.get("truths", {}), {}
    for name, section in (content.get("suites", {}) | content.get("auditors", {})).items():
        rows = []
        for row in section["cells"].values():
            truth = truths.get(f"{row['data']}/{row['name']}")
            if row["name"] not in ENTRIES:  # no longer in the testbed
                continue
            if row["kind"] == "honest":
                rows.append((row, not row["trusted"]))
            elif truth is not None:
                rows.append((row, overstated(row, truth)))
        found[name] = rows
    return found


def rate(rows: Iterable[tuple[Row, bool]]) -> str:
    """Return the share of wrong judgements with its Wilson interval, or a dash where there is no model."""
    wrong = [one for _, one in rows]
    return f"{Rate.of(sum(wrong), len(wrong))} of {len(wrong)}" if wrong else "\N{EN DASH}"


def table(head: str, lines: dict[str, list[str]], columns: Iterable[str]) -> list[str]:
    """Return a Markdown table."""
    columns = list(columns)
    top = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return top + [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]


def by_library(found: dict[str, list[tuple[Row, bool]]]) -> list[str]:
    """Return a line per auditor and data: overstated models by library, and honest ones accused."""
    lines = {}
    for name, rows in found.items():
        for data in dict.fromkeys(row["data"] for row, _ in rows):
            here = [(row, wrong) for row, wrong in rows if row["data"] == data]
            obfuscated = [(row, wrong) for row, wrong in here if row["kind"] == "obfuscated"]
            cells = [rate(one for one in obfuscated if ENTRIES[one[0]["name"]].library == it) for it in LIBRARIES]
            honest = [(row, wrong) for row, wrong in here if row["kind"] == "honest"]
            lines[f"{name}, {data}"] = [*cells, rate(obfuscated), rate(honest)]
    return table("auditor", lines, (*(f"{it} library" for it in LIBRARIES), "all obfuscated", "honest, accused"))


BESIDE = {
    "this audit, `standard`": ("standard",),
    "this audit, `quick`": ("quick",),
    "this audit, `thin`": ("thin",),
    "this audit, `thin`, two libraries at first sight": (
        "thin, second library at first sight",
        "thin, third library at first sight",
    ),
    "AutoAttack with its flags": ("autoattack",),
    "PGD of ART": ("art",),
    "PGD of Foolbox": ("foolbox",),
}


def beside(path: Path = RATES) -> str:
    """Return the table of auditors side by side, as Markdown: models overstated by data, and honest ones accused."""
    found = judged(json.loads(path.read_text()))
    lines = {}
    for name, sections in BESIDE.items():
        rows = [one for section in sections for one in found.get(section, ())]
        obfuscated = [one for one in rows if one[0]["kind"] == "obfuscated"]
        cells = [rate(one for one in obfuscated if one[0]["data"] == data) for data in testbed.DATA]
        if rows:
            lines[name] = [*cells, rate(one for one in rows if one[0]["kind"] == "honest")]
    columns = [f"overstated on {data}" for data in testbed.DATA]
    return "\n".join(table("auditor", lines, (*columns, "honest, accused"))) + "\n"


def by_kind(found: dict[str, list[tuple[Row, bool]]]) -> list[str]:
    """Return a line per kind: overstated models by auditor, over all data."""
    kinds = [kind for kind in testbed.KINDS if kind != "honest"]
    known = {name: rows for name, rows in found.items() if any(row["kind"] == "obfuscated" for row, _ in rows)}
    lines = {
        kind: [rate(one for one in rows if ENTRIES[one[0]["name"]].kind == kind) for rows in known.values()]
        for kind in kinds
    }
    return table("kind", lines, known)


def folds(rows: list[Row]) -> dict[str, tuple[int, int, int, int]]:
    """Leave out each kind in turn: are its models found by checks that the other kinds call for?

    A model needs finding where the audit's numbers are not by themselves those of the undefended network. Only checks
    that fail on no honest model count. ``all``: every check that fails on a model of another kind; ``few``: the fewest
    that find all of the other kinds' models which any finds, chosen greedily.

    Args:
        rows: the cells of one suite.

    Returns:
        For each kind: models, found by any check, by ``all``, and by ``few``.
    """
    honest = {check for row in rows if row["kind"] == "honest" for check in row["failed"]}
    open_rows = [row for row in rows if row["kind"] == "obfuscated" and not any(row.get("broken", {}).values())]
    failed = [(ENTRIES[row["name"]].kind, set(row["failed"]) - honest) for row in open_rows if row["name"] in ENTRIES]
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in failed):
        others = [checks for other, checks in failed if other != kind]
        own = [checks for other, checks in failed if other == kind]
        every, few, left = set().union(*others), set[str](), [checks for checks in others if checks]
        while left:
            catches = {check: sum(check in checks for checks in left) for check in sorted(every)}
            few.add(max(catches, key=catches.__getitem__))
            left = [checks for checks in left if not checks & few]
        any_check, some, fewest = (
            sum(bool(checks & kept) for checks in own) for kept in (set().union(*own), every, few)
        )
        found[kind] = (len(own), any_check, some, fewest)
    return found


def by_fold(content: dict[str, Any]) -> list[str]:
    """Return a line per suite and kind that is left out."""
    lines = {}
    for name, section in content.get("suites", {}).items():
        for kind, (n, *counts) in folds(list(section["cells"].values())).items():
            lines[f"{name}, {kind}"] = [str(n), *(f"{Rate.of(count, n)}" for count in counts)]
    columns = ("models", "found by any check", "by checks that fail on other kinds", "by the fewest such checks")
    return table("kind left out", lines, columns)


_NONE = 3
"""Bars of a head without a column."""


def text(path: Path = RATES) -> str:
    """Return the three tables as Markdown."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    found = judged(content)
    table = by_kind(found)
    kinds = ["The same by kind, over all data:", "", *table, ""] if table[0].count("|") > _NONE else []
    parts = [
        "Obfuscated models that an auditor trusts and calls clearly more robust than they are, and honest ones that it",
        "accuses:",
        "",
        *by_library(found),
        "",
        *kinds,
        "K-fold by kind: of the models that the attacks alone do not bring down to the undefended network, how many",
        "are found without the kind's own checks? Checks have fixed thresholds, which are not chosen anew: what is",
        "left out is every check that only this kind calls for, and in the last column all but the fewest that the",
        "other kinds need. Checks that fail on any honest model count for nothing.",
        "",
        *by_fold(content),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Renew the page."""
    head, rest = PAGE.read_text().split("<!-- rates by library -->\n")
    PAGE.write_text(f"{head}<!-- rates by library -->\n{text()}{rest[rest.index('<!-- /rates by library -->') :]}")


if __name__ == "__main__":
    main()
