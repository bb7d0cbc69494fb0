"""Results of an earlier summary in place of what was not run again, where the cells behind them are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gambeson.base import UserError
from gambeson.studies.matrix import Cell, Matrix
from gambeson.studies.rows import Result, StudyResult, judged
from gambeson.studies.study import Study

_SHOWN = ("data", "model", "defense", "variant", "at", "seed")
_UNTOLD: dict[str, Any] = {"recipe": {}, "verdicts": {}, "folders": {}}
"""What a summary does not say of a row."""


def joined(result: StudyResult, earlier: Mapping[str, Any]) -> StudyResult:
    """Take over from an earlier summary that of which it has more numbers.

    Whole data sets are taken, at equal steps or at equal time: claims are judged within these, so that no number is
    compared with one that other code has made. What the earlier summary had itself taken over keeps its date. Verdicts
    of audits are not in a summary.

    Args:
        result: of :func:`gambeson.studies.read_study`.
        earlier: what ``gambeson study export --to json`` wrote.

    Raises:
        UserError: that is no summary, or one of a study with other settings.
    """
    study, (theirs, old) = Study(**result.study), _parts(earlier)
    if unlike := sorted(key for key, value in theirs.plain().items() if result.study[key] != value):
        raise UserError(f"the summary is of a study with another {', '.join(unlike)}: expected one of the same study")
    run, there = (Counter(_place(row) for row in rows for _ in row.values) for rows in (result.rows, old))
    new = {place for place, numbers in there.items() if numbers > run[place]}
    taken = {_key(row): row for row in old if _place(row) in new}
    rows = [taken.get(_key(row), row) for row in result.rows]
    behind: dict[bool, set[str]] = {False: set(), True: set()}  # addresses of what is done, here and there
    for (_, cells), row in zip(Matrix(study).table, rows, strict=True):
        done = [cell for label, cell in cells.items() if label not in row.missing]
        behind[_key(row) in taken] |= {cell.address for cell in _with_needs(done)}
    searched = {(one["data"], one["model"]) for one in result.searches}
    searches = [one for one in earlier.get("searches", ()) if (one["data"], one["model"]) not in searched]
    machines, dates = earlier["environments"] if new else [], dict(result.joined)
    for date, place in sorted({(row.date, _named(row)) for row in taken.values()}):
        dates[date] = [*dates.get(date, ()), place]
    return result.model_copy(
        update={
            "rows": rows,
            "claims": judged(study, rows),
            "searches": [*result.searches, *searches],
            "done": result.done + len(behind[True] - behind[False]),
            "environments": [*result.environments, *(one for one in machines if one not in result.environments)],
            "joined": dates,
        }
    )


def _with_needs(cells: Iterable[Cell]) -> Iterator[Cell]:
    for cell in cells:
        yield cell
        yield from _with_needs(cell.needs)


def _parts(earlier: Mapping[str, Any]) -> tuple[Study, list[Result]]:
    """Return the study, with the defaults of settings that are newer than the summary, and its rows."""
    try:
        study = Study(**earlier["study"])
        dates = {place: date for date, places in earlier.get("joined", {}).items() for place in places}
        device = {"device": ", ".join(sorted({one["device"] for one in earlier["environments"]}))}
        rows = [
            Result(
                **{name: row[name] for name in (*_SHOWN, "values")},
                missing=row["not run"],
                flat=row.get("flat"),
                **_UNTOLD,
                **device,
            )
            for row in earlier["rows"]
        ]
        date = str(earlier["date"])
        return study, [row.model_copy(update={"date": dates.get(_named(row), date)}) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError("expected a summary of a study, which `gambeson study export STUDY --to json` writes") from None


def _key(row: Result) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in _SHOWN)


def _named(row: Result) -> str:
    return f"{row.data}, {row.model}, equal {row.at}"


def _place(row: Result) -> tuple[str, str, str]:
    return row.data, row.model, row.at
