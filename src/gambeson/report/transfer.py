"""The page about a transfer table: which model's adversarial examples break which other model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from gambeson.base import count, eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.transfer import TransferResult, TransferTable
from gambeson.report.formatting import Facts, flat, interval, meaning_of_eps, of_hundred, percent
from gambeson.report.summary import Step, quoted, squares
from gambeson.report.tables import NONE, Cell, Group, Line, Table, rate_cell


@dataclass(frozen=True)
class Page:
    """The page's data."""

    title: str
    setting: str
    answer: str
    squares: list[str]
    """Of the answer's 100 images, see :func:`gambeson.report.summary.squares`."""
    strength: str
    tables: list[Table]
    steps: list[Step]
    facts: list[Facts]


@dataclass(frozen=True)
class _Case:
    """Examples of one model shown to another."""

    error: Rate
    source: int
    target: int
    attack: str


def build(result: TransferResult) -> Page:
    """Build the page's data."""
    run, labels = result.run, result.labels
    cases = [
        _Case(rate, source, target, table.attack)
        for table in result.tables
        for source, row in enumerate(table.errors)
        for target, rate in enumerate(row)
        if rate is not None and source != target
    ]
    worst = max(cases, key=lambda case: case.error.value - result.clean[case.target].value, default=None)
    tested = result.clean[0].n
    asked = "How many do those get wrong?" if result.unit == "image" else "How many of their pixels do those get wrong?"
    return Page(
        title=f"Transfer between {count(len(labels), 'model')}" + (f" on {run.data}" if run.data else ""),
        setting=f"{count(tested, 'test image')} were perturbed by {count(len(result.tables), 'attack')} (eps "
        f"{eps_text(result.eps)}) on one model each, and shown to the others. {asked}",
        answer=_answer(result, worst, len(cases)),
        squares=[] if worst is None else squares(worst.error, result.clean[worst.target]),
        strength=meaning_of_eps(run.norm),
        tables=[_table(table, result) for table in result.tables],
        steps=[] if worst is None else _steps(result, worst),
        facts=[
            Facts("Run", flat(run.model_dump(mode="json"))),
            Facts("Versions", flat(result.environment)),
        ],
    )


def _answer(result: TransferResult, worst: _Case | None, candidates: int) -> str:
    if worst is None:
        return "No model was shown what was made on another: nothing can be made on a black box."
    source, target = (quoted(result.labels[k]) for k in (worst.source, worst.target))
    clean = result.clean[worst.target]
    error = worst.error.among(candidates)
    hundred = "100" if result.unit == "image" else "100 pixels"
    clear = "" if error.low > clean.high else " That is not clearly more than without an attack."
    return (
        f"Images made on {source} ({worst.attack}) make {target} wrong on {of_hundred(worst.error.value)} of "
        f"{hundred}; "
        f"without an attack it is wrong on {of_hundred(clean.value)}.{clear}"
    )


def _table(table: TransferTable, result: TransferResult) -> Table:
    def cells(rates: list[Rate | None], own: int | None = None) -> list[Cell]:
        return [
            NONE if rate is None else Cell(percent(rate.value), (interval(rate),), shade=_shade(rate), own=k == own)
            for k, rate in enumerate(rates)
        ]

    lines = [Line("no attack", "clean images", [rate_cell(rate) for rate in result.clean], minor=True)]
    lines += [
        Line(label, "" if any(row) else "a black box: nothing can be made on it", cells(row, k))
        for k, (label, row) in enumerate(zip(result.labels, table.errors, strict=True))
    ]
    lines.append(Line("worst of the others", "outside the diagonal", cells(table.worst)))
    return Table(table.attack, ["Made on", *(f"shown to {label}" for label in result.labels)], [Group(None, lines)])


def _shade(rate: Rate) -> str:
    """A background that darkens with the error and keeps black text readable."""
    return f"rgba(196, 80, 10, {0.6 * rate.value:.2f})"


def _steps(result: TransferResult, worst: _Case) -> list[Step]:
    run = result.run
    source, target = (shlex.quote(run.models[k]) for k in (worst.source, worst.target))
    data = f" --data {shlex.quote(run.data)}" if run.data else ""
    audit = f"gambeson audit {target}{data} --surrogate {source} --eps {eps_text(result.eps)}"
    return [
        Step("Audit the model that is broken most, with the model that breaks it as the surrogate:", audit),
    ]
