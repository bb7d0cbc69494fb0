"""The rows of a study: its results as a table, its claims with their verdicts, a summary, and files for other tools."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from gambeson.base import Config, UserError, replaceable, required, write_bytes, write_json, write_text
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.measures import Value
from gambeson.studies.store import Damaged, Store
from gambeson.studies.study import Study
from gambeson.studies.verdicts import Point, Verdict, verdicts

SUMMARY = "summary.json"
FORMATS = ("csv", "parquet", "json")


class Result(Point):
    """A row of the table: a trained model and its numbers."""

    missing: list[str]
    """Labels of what is not run yet; ``train`` if the model is not trained."""
    recipe: dict[str, Any]
    """Of the training, after the search."""
    flat: bool | None = None
    """Whether the validation score was flat at the length of this training; None: not looked into."""
    verdicts: dict[str, dict[str, Any]]
    """Of audits, by label."""
    folders: dict[str, str]
    """Folders of the cells, relative to the root, by label."""
    device: str = ""
    date: str = ""


class StudyResult(Config):
    """All that a study has found so far."""

    study: dict[str, Any]
    """Its settings."""
    rows: list[Result]
    claims: list[Verdict]
    searches: list[dict[str, Any]] = Field(default_factory=list)
    """What each search chose, and all that it tried."""
    cells: int
    done: int
    failed: dict[str, str]
    """Why cells failed, by their titles."""
    damaged: dict[str, str] = Field(default_factory=dict)
    """Why stored results cannot be used, likewise; the next run makes these cells again."""
    environments: list[dict[str, str]]
    """Versions and devices behind the results; more than one where they differ."""
    date: str
    joined: dict[str, list[str]] = Field(default_factory=dict)
    """What :func:`gambeson.studies.joined` took over from earlier summaries, by their dates."""


def collect(matrix: Matrix, store: Store) -> StudyResult:
    """Read every result of a study; what is missing or damaged counts as not run."""
    damaged: dict[str, str] = {}
    stored = {cell.address: _read(store, cell, damaged) for cell in matrix.cells}
    lengths = {
        (row.data, row.model, row.defense): stored[cells["lengths"].address]
        for row, cells in matrix.table
        if "lengths" in cells
    }
    rows = [
        _row(row, cells, stored, store, lengths.get((row.data, row.model, row.defense))) for row, cells in matrix.table
    ]
    known: list[dict[str, str]] = []
    for content in stored.values():
        if content is not None and content["environment"] not in known:
            known.append(content["environment"])
    study = matrix.study
    return StudyResult(
        study=study.plain(),
        rows=rows,
        claims=judged(study, rows),
        searches=[
            {"data": cell.row.data, "model": cell.row.model, "defense": cell.row.defense, **content["result"]}
            for cell in matrix.cells
            if cell.kind == "search" and (content := stored[cell.address]) is not None
        ],
        cells=len(stored),
        done=sum(content is not None for content in stored.values()),
        failed={
            cell.title: one.message.split("\n")[0]
            for cell in matrix.cells
            if stored[cell.address] is None and (one := store.failure(cell)) is not None
        },
        damaged=damaged,
        environments=known,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    )


def judged(study: Study, rows: Sequence[Result]) -> list[Verdict]:
    """Return the verdicts of a study on its rows, those without a number included."""
    places = list(dict.fromkeys((row.data, row.model) for row in rows))
    return verdicts(study.claims, [row for row in rows if row.values], study.at, places)


def _read(store: Store, cell: Cell, damaged: dict[str, str]) -> dict[str, Any] | None:
    try:
        return store.read(cell)
    except Damaged as error:
        damaged[cell.title] = str(error)
        return None


def _row(
    row: Any,
    cells: dict[str, Cell],
    stored: dict[str, dict[str, Any] | None],
    store: Store,
    lengths: dict[str, Any] | None,
) -> Result:
    found = {label: stored[cell.address] for label, cell in cells.items()}
    values: dict[str, Value] = {}
    audits: dict[str, dict[str, Any]] = {}
    for label, content in found.items():
        if content is None:
            continue
        if label == "lengths":
            continue
        if label == "train":
            values |= {f"train.{name}": Value(value=value) for name, value in content["result"]["values"].items()}
        else:
            values |= {f"{label}.{name}": Value(**value) for name, value in content["result"]["metrics"].items()}
            if content["result"]["verdict"]:
                audits[label] = content["result"]["verdict"]
    train = found["train"]
    recipe: dict[str, Any] = {} if train is None else train["result"]["recipe"]
    return Result(
        data=row.data,
        model=row.model,
        defense=row.defense,
        variant=row.variant,
        at=row.at,
        seed=row.seed,
        values=values,
        missing=[label for label, content in found.items() if content is None],
        recipe=recipe,
        flat=None if not recipe or lengths is None else _flat(recipe["epochs"], lengths["result"]["flat from"]),
        verdicts=audits,
        folders={label: str(store.folder(cell).relative_to(store.root)) for label, cell in cells.items()},
        device="" if train is None else train["environment"]["device"],
        date="" if train is None else train["date"],
    )


def _flat(epochs: int, flat_from: int | None) -> bool:
    return flat_from is not None and epochs >= flat_from


def summary(result: StudyResult) -> dict[str, Any]:
    """Return what is worth keeping of a study, small enough for version control."""
    rows = [
        {
            **{name: getattr(row, name) for name in ("data", "model", "defense", "variant", "at", "seed")},
            "values": {name: value.model_dump(exclude_defaults=True) for name, value in row.values.items()},
            "not run": row.missing,
            **({} if row.flat is None else {"flat": row.flat}),
        }
        for row in result.rows
    ]
    return {
        "study": result.study,
        "rows": rows,
        "claims": [claim.plain() for claim in result.claims],
        **({"searches": result.searches} if result.searches else {}),
        "cells": result.cells,
        "done": result.done,
        "failed": result.failed,
        "environments": result.environments,
        "date": result.date,
        **({"joined": result.joined} if result.joined else {}),
    }


def write_summary(result: StudyResult, folder: Path) -> Path:
    """Write ``summary.json`` and return its path."""
    write_json(folder / SUMMARY, summary(result))
    return folder / SUMMARY


def export(result: StudyResult, form: str, out: Path) -> Path:
    """Write the rows as a table, one line per number, or the summary.

    Args:
        result: of :func:`collect`.
        form: ``csv``, ``parquet`` or ``json``.
        out: the file.

    Raises:
        UserError: another form, or a package is missing.
    """
    if form not in FORMATS:
        raise UserError(f"--to {form}: expected one of {', '.join(FORMATS)}, cells")
    if form == "json":
        replaceable(out, "the summary of a study")
        write_json(out, summary(result))
        return out
    lines = [
        {
            **{name: getattr(row, name) for name in ("data", "model", "defense", "variant", "at", "seed")},
            "metric": metric,
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "n": value.n,
            "censored": value.censored,
            "device": row.device,
            "date": row.date,
        }
        for row in result.rows
        for metric, value in row.values.items()
    ]
    if not lines:
        raise UserError("the study has no results yet: run it first, `gambeson study run FILE`")
    if form == "csv":
        replaceable(out, "the CSV of a study")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_text(out, text.getvalue())
        return out
    pyarrow, parquet = (required(name, "parquet", "choose --to csv") for name in ("pyarrow", "pyarrow.parquet"))
    replaceable(out, "the Parquet of a study")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(lines), sink)
    write_bytes(out, sink.getvalue().to_pybytes())
    return out
