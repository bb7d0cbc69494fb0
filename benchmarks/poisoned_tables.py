"""What ``benchmarks/poisoned.py`` makes of its cells: error rates, and which diagnostic saw which model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gambeson.auditing import DIAGNOSTICS
from gambeson.evaluation import Rate

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library stands with the tests, which are not installed
from tests.auditing.poisoned import broken

MISSED, ALARMS = "missed", "distrusted without reason"
BELIEVED = "missed where both numbers must be those of the undefended network"


def rates(row: dict[str, Any]) -> tuple[Rate, Rate]:
    """Return what was stored of :func:`worst`."""
    return Rate(**row["uer"]), Rate(**row["per_image"])


def judged(rows: dict[str, dict[str, Any]], sets: Iterable[str]) -> dict[str, Any]:
    """Return both error rates, the models behind them, and the matrix of models and diagnostics.

    Args:
        rows: the cells by name.
        sets: the data that poisoned models are made on; each has its undefended network.
    """
    bases = {data: rows[key] for data in sets if (key := f"honest/{data}/standard") in rows}
    poisoned = [row for row in rows.values() if row["kind"] == "poisoned" and row["data"] in bases]
    honest = [row for row in rows.values() if row["kind"] == "honest"]
    alarms = [row for row in honest if not row["trusted"]]
    missed, believed = [], []
    for row in poisoned:
        row["broken"] = broken(rates(row), rates(bases[row["data"]])) if "uer" in row else {"crashed": False}
        if row["trusted"] and not any(row["broken"].values()):
            missed.append(row)
        if row["trusted"] and not all(row["broken"].values()):
            believed.append(row)
    return {
        MISSED: share(missed, poisoned),
        BELIEVED: share(believed, poisoned),
        ALARMS: share(alarms, honest),
        "matrix": {
            f"{row['name']} on {row['data']}": {one.name: seen(one.name, row) for one in DIAGNOSTICS}
            for row in rows.values()
        },
    }


def share(some: list[dict[str, Any]], of: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a rate over models with the names of those that count."""
    names = [f"{row['name']} on {row['data']}" + "".join(f"; {name}" for name in row["failed"]) for row in some]
    return Rate.of(len(some), len(of)).plain() | {"models": names}


def seen(diagnostic: str, row: dict[str, Any]) -> str:
    """Return what a diagnostic made of a model."""
    if diagnostic in row["failed"]:
        return "failed"
    return "passed" if diagnostic in row.get("passed", ()) else "does not apply"


def show(rows: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> None:
    """Print a line a model, the matrix as marks, and the two error rates."""
    names = [diagnostic.name for diagnostic in DIAGNOSTICS]
    for number, name in enumerate(names):
        print(f"{number:3} {name}")
    marks = {"failed": "X", "passed": ".", "does not apply": " "}
    for row in rows.values():
        line = "".join(marks[verdict["matrix"][f"{row['name']} on {row['data']}"][name]] for name in names)
        numbers = (
            row.get("crashed")
            or row.get("refused")
            or "UER {:.3f}, under attack {:.3f}, {:.0f} s".format(
                row["uer"]["value"], row["per_image"]["value"], row["seconds"]
            )
        )
        broke = ", ".join(how for how, yes in row.get("broken", {}).items() if yes)
        said = ("trusted" if row["trusted"] else "distrusted") + (f", broken ({broke})" if broke else "")
        print(f"{row['kind']:8} {row['data']:13} {row['name']:42} |{line}| {numbers}; {said}")
    for name in (MISSED, BELIEVED, ALARMS):
        rate = verdict[name]
        print(f"{name}: {100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] of {rate['n']}")
        for model in rate["models"]:
            print(f"    {model}")
