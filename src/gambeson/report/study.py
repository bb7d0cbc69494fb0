"""The page about a study: claims with verdicts, a table of all models, and their trade-offs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gambeson.report.charts import AXIS, LEGEND, Chart, embed, hue, plain_layout, symbol
from gambeson.report.formatting import Facts, flat, percent
from gambeson.studies.claims import Claim
from gambeson.studies.measures import Value, meaning
from gambeson.studies.rows import Result, StudyResult
from gambeson.studies.verdicts import Finding, front, interval, learnt

AT = {"steps": "equal steps", "seconds": "equal time"}
_BADGES = {
    "reproduced": ("withstands", "✓"),
    "not reproduced": ("broken", "✗"),
    "undecided": ("undecided", "?"),
    "not run": ("doubted", "–"),
}
_SHOWN = ("train.seconds", "train.steps")
_TRADES = ("uer", "eps_uni", "accuracy", "attacked")


@dataclass(frozen=True)
class Number:
    """A cell of the table."""

    text: str
    below: str
    sort: str
    """What it is sorted by; empty: last."""


@dataclass(frozen=True)
class Detail:
    """One seed of a row."""

    title: str
    numbers: list[tuple[str, str]]
    audits: list[tuple[str, str, dict[str, Any]]]
    """Address of the page, command that writes it, and verdict."""
    facts: list[tuple[str, str]]
    missing: str


@dataclass(frozen=True)
class Line:
    """A row of the table: one trained defence, over all seeds."""

    key: str
    name: str
    note: str
    data: str
    at: str
    words: str
    """What the filter searches."""
    numbers: list[Number]
    seeds: list[Detail]


@dataclass(frozen=True)
class ClaimLine:
    """A claim on one data set and architecture."""

    name: str
    statement: str
    source: str
    test: str
    """What is compared, and with which margin."""
    at: str
    where: str
    effect: str
    badge: str
    mark: str
    verdict: str
    note: str
    overall: str
    """The verdict over all data and architectures."""


@dataclass(frozen=True)
class Page:
    """The page's data."""

    title: str
    summary: str
    state: str
    claims: list[ClaimLine]
    heads: list[str]
    lines: list[Line]
    data: list[str]
    ats: list[tuple[str, str]]
    charts: list[tuple[str, list[Chart]]]
    failed: list[tuple[str, str]]
    facts: list[Facts]


def plain_name(row: Result, label: str) -> str:
    """The name of a file about a measurement of a row."""
    parts = (label, row.defense, row.variant, row.data, row.model, row.at, f"seed-{row.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts if part)


def build(result: StudyResult, pages: Mapping[str, str] | None = None) -> Page:
    """Build the page's data.

    Args:
        result: what a study has found.
        pages: addresses of audits' pages by the folders of their cells.
    """
    study = result.study
    metrics = [name for row in result.rows for name in row.values]
    metrics = [name for name in dict.fromkeys(metrics) if not name.startswith("train.")] + [
        name for name in _SHOWN if name in metrics
    ]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for row in result.rows:
        groups.setdefault((row.data, row.model, row.defense, row.variant, row.at), []).append(row)
    devices = sorted({f"{one['device']}, torch {one['torch']}" for one in result.environments})
    return Page(
        title=f"Study: {study['name']}",
        summary=study["summary"],
        state=f"{result.done:,} of {result.cells:,} cells are done, as of {result.date} UTC"
        + (f"; computed on {' and on '.join(devices)}." if devices else "."),
        claims=[
            _claim(Claim(**study["claims"][verdict.claim]), finding, _overall(result, verdict.claim))
            for verdict in result.claims
            for finding in verdict.findings
        ],
        heads=[_head(name) for name in metrics],
        lines=[_line(f"row{k}", rows, metrics, pages or {}) for k, rows in enumerate(groups.values())],
        data=list(dict.fromkeys(row.data for row in result.rows)),
        ats=[(at, AT[at]) for at in study["at"]],
        charts=_charts(result, metrics),
        failed=list((result.damaged | result.failed).items()),
        facts=[
            Facts("Study", [row for row in flat(study) if not row[0].startswith("claims.")]),
            *(Facts("Versions", flat(one)) for one in result.environments),
        ],
    )


def _head(metric: str) -> str:
    label, _, _ = metric.partition(".")
    words = meaning(metric).words
    return words if label == "train" else f"{words} ({label})"


def _overall(result: StudyResult, claim: str) -> str:
    found = [f"{one.verdict} at {AT[one.at]}" for one in result.claims if one.claim == claim]
    return f"All in all: {'; '.join(found)}."


def _test(claim: Claim) -> str:
    """What a claim compares, and with which margin, as a phrase."""
    word = {"difference": " minus ", "ratio": " over "}.get(claim.how, ", ")
    if claim.how == "correlation":
        sides = " minus that of ".join(str(side.metric) for side in claim.sides)
        said = f"Rank correlation of {sides}, with {claim.metric}"
    else:
        names = [f"{side.defense}{f' ({side.variant})' if side.variant else ''}" for side in claim.sides]
        metrics = [side.metric or claim.metric for side in claim.sides]
        alike = len(set(metrics)) == 1
        said = f"{metrics[0]} of " if alike else ""
        said += word.join(names if alike else [f"{m} of {name}" for m, name in zip(metrics, names, strict=True)])
    said += f", at equal {claim.matched}" if claim.matched else ""
    if claim.keeping is not None:
        said += f", of what is at most {100 * claim.keeping.drop:g} points below {claim.keeping.than} on validation"
    return f"{said}: {'at most' if claim.at_least is None else 'at least'} {claim.margin:g}."


def _claim(claim: Claim, finding: Finding, overall: str) -> ClaimLine:
    badge, mark = _BADGES[finding.verdict]
    effect = "–" if finding.effect is None else f"{finding.effect:.3g}"
    if finding.low is not None and finding.high is not None:
        effect += f" [{finding.low:.3g}, {finding.high:.3g}]"
    notes = [f"{len(finding.effects)} {'seed' if len(finding.effects) == 1 else 'seeds'}"]
    if finding.verdict == "undecided" and finding.low is not None:
        more = finding.seeds_to_decide
        notes.append(f"{more:,} would decide it" if more else "no number of seeds up to 10,000 would decide it")
    notes += [finding.note] if finding.note else []
    return ClaimLine(
        name=finding.claim,
        statement=claim.statement,
        source=claim.source,
        test=_test(claim),
        at=AT[finding.at],
        where=f"{finding.data}, {finding.model}",
        effect=effect,
        badge=badge,
        mark=mark,
        verdict=finding.verdict,
        note="; ".join(notes),
        overall=overall,
    )


def _text(value: float, metric: str) -> str:
    return percent(value) if meaning(metric).share else f"{value:.4g}"


def _number(values: Sequence[Value], metric: str) -> Number:
    """The mean over seeds; below it its interval, which of one seed is over images."""
    if not values:
        return Number("–", "not run", "")
    mean, ends = statistics.fmean(value.value for value in values), _interval(values, metric)
    below = "" if ends is None else f"[{_ends(ends[0], metric)}, {_ends(ends[1], metric)}]"
    beyond = any(value.censored for value in values)
    return Number(f"{'> ' if beyond else ''}{_text(mean, metric)}", below, repr(mean))


def _interval(values: Sequence[Value], metric: str) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds, or of one seed over images, if it has one."""
    if len(values) == 1:
        (one,) = values
        return None if one.low is None or one.high is None else (one.low, one.high)
    ends, kind = interval([value.value for value in values]), meaning(metric)
    return None if ends is None else (max(ends[0], kind.least), min(ends[1], 1.0) if kind.share else ends[1])


def _ends(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if meaning(metric).share else f"{value:.4g}"


def _line(key: str, rows: Sequence[Result], metrics: Sequence[str], pages: Mapping[str, str]) -> Line:
    first = rows[0]
    where = [first.data, first.model, AT[first.at]]
    return Line(
        key=key,
        name=first.defense,
        note=", ".join([*([first.variant] if first.variant else []), *where]),
        data=first.data,
        at=first.at,
        words=" ".join([first.defense, first.variant, *where]).lower(),
        numbers=[_number([row.values[name] for row in rows if name in row.values], name) for name in metrics],
        seeds=[_detail(row, metrics, pages) for row in rows],
    )


def _detail(row: Result, metrics: Sequence[str], pages: Mapping[str, str]) -> Detail:
    numbers = []
    for name in metrics:
        if (value := row.values.get(name)) is not None:
            ends = (
                ""
                if value.low is None or value.high is None
                else f" [{_ends(value.low, name)}, {_ends(value.high, name)}]"
            )
            numbers.append((_head(name), f"{'> ' if value.censored else ''}{_text(value.value, name)}{ends}"))
    learnt = row.values.get("train.learnt")
    flat_text = {None: "not looked into", True: "flat at this length", False: "longer training still helped"}[row.flat]
    facts = [("validation score", flat_text)] if row.recipe else []
    facts += (
        [("warning", "it has not learnt: no better than the most frequent class")]
        if learnt and not learnt.value
        else []
    )
    facts += [(name, str(row.recipe[name])) for name in ("epochs", "lr", "warmup", "batch_size") if name in row.recipe]
    facts += [(f"folder of {label}", folder) for label, folder in row.folders.items() if label not in row.missing]
    audits = [
        (pages.get(row.folders[label], ""), f"gambeson report {row.folders[label]}/audit --out {label}.html", verdict)
        for label, verdict in row.verdicts.items()
    ]
    return Detail(f"seed {row.seed}", numbers, audits, facts, ", ".join(row.missing))


def _charts(result: StudyResult, metrics: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    kinds = {label: measure["kind"] for label, measure in result.study["measures"].items()}
    cleans = [name for name in metrics if name.endswith(".clean") or kinds.get(name.partition(".")[0]) == "accuracy"]
    if not cleans:
        return []
    others = [name for name in metrics if name not in cleans and name.partition(".")[2] in _TRADES]
    found: list[tuple[str, list[Chart]]] = []
    for at in result.study["at"]:
        for data, model in dict.fromkeys((row.data, row.model) for row in result.rows):
            rows = [row for row in result.rows if (row.data, row.model, row.at) == (data, model, at)]
            charts = [
                chart
                for other in others
                if (chart := _chart(f"chart{len(found)}-{other.replace('.', '-')}", rows, cleans[0], other)) is not None
            ]
            if charts:
                found.append((f"{data}, {model}, {AT[at]}", charts))
    return found


def _chart(name: str, rows: Sequence[Result], clean: str, other: str) -> Chart | None:
    """One point per defence and variant, with its intervals over seeds, and the Pareto front of the means.

    What has not learnt is left out.
    """
    points: dict[str, dict[str, tuple[list[Value], list[Value]]]] = {}
    for row in rows:
        if clean in row.values and other in row.values and learnt(row):
            both = points.setdefault(row.defense, {}).setdefault(row.variant, ([], []))
            both[0].append(row.values[clean])
            both[1].append(row.values[other])
    if not points:
        return None
    metrics = (clean, other)
    scales = [100.0 if meaning(metric).share else 1.0 for metric in metrics]
    traces: list[dict[str, Any]] = []
    means = []
    for k, (label, variants) in enumerate(points.items()):
        centres, arms = [], {}
        for i, axis in enumerate("xy"):
            centre = [statistics.fmean(value.value for value in both[i]) for both in variants.values()]
            ends = [_interval(both[i], metrics[i]) for both in variants.values()]
            lows, highs = zip(*(end or (mean, mean) for end, mean in zip(ends, centre, strict=True)), strict=True)
            centres.append([scales[i] * mean for mean in centre])
            arms[f"error_{axis}"] = {
                "type": "data",
                "symmetric": False,
                "array": [scales[i] * (high - mean) for high, mean in zip(highs, centre, strict=True)],
                "arrayminus": [scales[i] * (mean - low) for low, mean in zip(lows, centre, strict=True)],
                "color": hue(k),
                "thickness": 1,
            }
        means += list(zip(*centres, strict=True))
        look = {"color": hue(k), "symbol": symbol(k), "size": 10}
        text = [f"{label}{f' ({variant})' if variant else ''}" for variant in variants]
        traces.append(
            {"type": "scatter", "mode": "markers", "name": label, "x": centres[0], "y": centres[1], "marker": look}
            | {"text": text, "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>"}
            | arms
        )
    best = front(means, across=1, along=meaning(other).better)
    line = {"type": "scatter", "mode": "lines", "name": "Pareto front", "line": {"color": "#5a6675", "dash": "dot"}}
    traces.insert(0, line | {"x": [x for x, _ in best], "y": [y for _, y in best], "hoverinfo": "skip"})
    units = [" (%)" if scale == 100 else "" for scale in scales]
    layout = plain_layout(400 + 14 * len(traces)) | {"legend": LEGEND}
    layout["xaxis"] = {**AXIS, "title": {"text": f"{_head(clean)}{units[0]}"}}
    layout["yaxis"] = {**AXIS, "title": {"text": f"{_head(other)}{units[1]}"}}
    told = "; ".join(
        f"{trace['name']}: {', '.join(f'{x:.3g} and {y:.3g}' for x, y in zip(trace['x'], trace['y'], strict=True))}"
        for trace in traces[1:]
    )
    return Chart(name, embed({"data": traces, "layout": layout}), f"{_head(other)} against {_head(clean)}. {told}.")
