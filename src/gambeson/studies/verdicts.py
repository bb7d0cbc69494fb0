"""Verdicts on claims: the effect of each seed, its interval over the seeds, and what that says of a claim."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from gambeson.analysis.correlation import spearman
from gambeson.base import Config
from gambeson.studies.claims import Claim, Keeping, Side
from gambeson.studies.measures import Value, meaning

Word = Literal["reproduced", "not reproduced", "undecided", "not run"]
LEVELS = 5
"""Clean accuracies at which two fronts are compared, evenly spread over what they share."""
MOST_SEEDS = 10_000
_ROUNDING = 1e-9
_ALONE = "a single seed says something, and an interval takes two"


class Point(Config):
    """One row of a study as claims see it."""

    data: str
    model: str
    defense: str
    variant: str = ""
    at: str = "steps"
    seed: int
    values: dict[str, Value]
    """By metric."""


class Finding(Config):
    """What a study found of a claim, on one data set and architecture."""

    claim: str
    data: str
    model: str
    at: str
    """Whether the models had equal optimiser steps or equal training time."""
    verdict: Word
    effects: dict[int, float]
    """By seed."""
    effect: float | None = None
    """Mean over the seeds; of a ratio, geometric."""
    low: float | None = None
    high: float | None = None
    seeds_to_decide: int | None = None
    """How many seeds would decide an undecided claim if effect and spread stayed as they are; None: not known, or more
    than 10,000."""
    note: str = ""

    @property
    def words(self) -> str:
        """The verdict, with what else it would take; where there is no interval, why."""
        if self.verdict == "not run":
            return self.note or "not run"
        if self.verdict != "undecided":
            return self.verdict
        if self.low is None:
            return f"undecided; {self.note}"
        more = self.seeds_to_decide
        return f"undecided; {f'{more:,}' if more else f'no number up to {MOST_SEEDS:,} of'} seeds would decide it"


class Verdict(Config):
    """The verdict on a claim over all its data sets and architectures."""

    claim: str
    statement: str
    source: str
    at: str
    verdict: Word
    findings: list[Finding]


def judge(name: str, claim: Claim, points: Sequence[Point], at: str, places: Sequence[tuple[str, str]]) -> Verdict:
    """Judge a claim.

    Args:
        name: of the claim.
        claim: the claim.
        points: all rows with a result.
        at: rows of equal ``steps`` or of equal ``seconds``.
        places: pairs of data set and architecture of the study.
    """
    mine = [
        (data, model)
        for data, model in places
        if data in (claim.data or (data,)) and model in (claim.models or (model,))
    ]
    corrected = 1 - (1 - claim.confidence) / max(1, len(mine))  # Bonferroni

    def found(confidence: float) -> list[Finding]:
        return [
            _finding(name, claim, [p for p in points if (p.data, p.model, p.at) == (*place, at)], at, place, confidence)
            for place in mine
        ]

    findings = found(corrected if claim.need == "any" else claim.confidence)
    return Verdict(
        claim=name,
        statement=claim.statement,
        source=claim.source,
        at=at,
        verdict=_overall([one.verdict for one in findings], [one.verdict for one in found(corrected)], claim.need),
        findings=findings,
    )


def _overall(words: Sequence[Word], surer: Sequence[Word], need: str) -> Word:
    """Return the verdict over all places; what one of them alone decides is taken at the corrected confidence."""
    if all(word == "not run" for word in words):
        return "not run"
    alone: Word = "reproduced" if need == "any" else "not reproduced"
    if alone in surer:
        return alone
    together: Word = "not reproduced" if need == "any" else "reproduced"
    return together if all(word == together for word in words) else "undecided"


def _finding(
    name: str, claim: Claim, points: Sequence[Point], at: str, place: tuple[str, str], confidence: float
) -> Finding:
    silent: dict[str, list[str]] = {}
    found: dict[int, _Effect] = {}
    for seed in sorted({point.seed for point in points}):
        mine = [point for point in points if point.seed == seed]
        try:
            found[seed] = _effect(claim, mine, points)
        except _Missing as missing:
            silent.setdefault(str(missing), []).append(str(seed))
    notes = [f"{'seeds' if seeds[1:] else 'seed'} {', '.join(seeds)}: {why}" for why, seeds in silent.items()]
    notes = [_ALONE, *notes] if len(found) == 1 else notes
    more, less = any(one.more for one in found.values()), any(one.less for one in found.values())
    if more or less:
        words = [word for word, said in (("more", more), ("less", less)) if said]
        notes.append(f"a number lies beyond the largest eps: the effect may be {' or '.join(words)}")
    about: dict[str, Any] = {"claim": name, "data": place[0], "model": place[1], "at": at}
    ratio = claim.how == "ratio"
    values = [one.value for one in found.values()]
    spread = max(statistics.stdev(values), *(one.step for one in found.values())) if len(values) > 1 else 0.0
    if len(values) > 1 and spread <= _ROUNDING:
        notes.append("the seeds agree to the last digit, which does not say how far others would differ")
    about["note"] = "; ".join(notes)
    if not found:
        return Finding(**about, verdict="not run", effects={})
    shown = {seed: math.exp(value) if ratio else value for seed, value in zip(found, values, strict=True)}
    mean, margin = statistics.fmean(values), math.log(claim.margin) if ratio else claim.margin
    out: Callable[[float], float] = math.exp if ratio else float
    if len(values) < 2:
        return Finding(**about, verdict="undecided", effects=shown, effect=out(mean))
    half = _half(spread, len(values), confidence) if spread > _ROUNDING else math.inf
    low, high = -math.inf if less else mean - half, math.inf if more else mean + half
    inside = (low >= margin, high < margin) if claim.at_least is not None else (high <= margin, low > margin)
    verdict: Word = "reproduced" if inside[0] else "not reproduced" if inside[1] else "undecided"
    ended = math.isfinite(high - low)
    about |= {"low": out(low), "high": out(high)} if ended else {}
    return Finding(
        **about,
        verdict=verdict,
        effects=shown,
        effect=out(mean),
        seeds_to_decide=_deciding(mean - margin, spread, len(values), confidence)
        if ended and verdict == "undecided"
        else None,
    )


def _half(spread: float, seeds: int, confidence: float) -> float:
    """Half the width of Student's interval of a mean, from the standard deviation over seeds."""
    from scipy.special import stdtrit

    return float(stdtrit(seeds - 1, (1 + confidence) / 2)) * spread / math.sqrt(seeds)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the ends of Student's interval of the mean over seeds; None where all agree, which tells no spread.

    Args:
        values: one a seed, of two or more.
        confidence: two-sided.
    """
    spread = statistics.stdev(values)
    if spread <= _ROUNDING:
        return None
    mean, half = statistics.fmean(values), _half(spread, len(values), confidence)
    return mean - half, mean + half


def _deciding(distance: float, spread: float, seeds: int, confidence: float) -> int | None:
    """The smallest number of seeds whose interval would leave the margin out."""
    low, high = seeds, MOST_SEEDS
    if _half(spread, high, confidence) >= abs(distance):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _half(spread, middle, confidence) < abs(distance) else (middle, high)
    return high


class _Missing(Exception):
    """A seed says nothing of a claim, and why."""


class _Effect(NamedTuple):
    """The effect of one seed; of a ratio, its logarithm."""

    value: float
    more: bool = False
    """Whether the true effect may be larger, because a number of the first side is only known to be."""
    less: bool = False
    step: float = 0.0
    """What half a test image more changes, or half a step of a search: seeds that agree to less tell no spread."""


def _effect(claim: Claim, points: Sequence[Point], every: Sequence[Point]) -> _Effect:
    if claim.how == "correlation":
        first, second = ([] if side is None else [side.metric] for side in (claim.of, claim.to))
        of = _correlation(points, str(first[0]), str(claim.metric))
        return _Effect(of - (_correlation(points, str(second[0]), str(claim.metric)) if second and second[0] else 0.0))
    if claim.matched is not None and claim.to is not None:
        return _between_fronts(claim, points)
    found = [_side(claim, side, _chosen(claim, side, points, every)) for side in claim.sides]
    values = [_on_scale(claim, value, side.defense, name) for side, name, value in found]
    censored = [value.censored for _, _, value in found]
    return _Effect(
        values[0] - (values[1] if len(values) > 1 else 0.0),
        more=censored[0],
        less=any(censored[1:]),
        step=max(_half_a_step(claim, value) for _, _, value in found),
    )


def _half_a_step(claim: Claim, value: Value) -> float:
    if not value.n:
        return value.step / 2 / (value.value if claim.how == "ratio" else 1.0)
    return 0.5 / (value.value * value.n + 0.5 if claim.how == "ratio" else value.n)


def _side(claim: Claim, side: Side, point: Point) -> tuple[Side, str, Value]:
    """The side with its metric and number."""
    name = side.metric or str(claim.metric)
    if name not in point.values:
        raise _Missing(f"{side.defense} has no {name} yet")
    if not learnt(point):
        raise _Missing(f"{side.defense} has not learnt, and says nothing of a defence")
    return side, name, point.values[name]


def _on_scale(claim: Claim, value: Value, defense: str, name: str) -> float:
    """The number, or its logarithm."""
    if claim.how != "ratio":
        return value.value
    # Of a share, half an image is added, so that none out of n has a logarithm too.
    number = (value.value * value.n + 0.5) / (value.n + 1) if value.n else value.value
    if number <= 0:
        raise _Missing(f"{name} of {defense} is {number:g}, which has no ratio")
    return math.log(number)


def _chosen(claim: Claim, side: Side, points: Sequence[Point], every: Sequence[Point]) -> Point:
    """The row of a side for one seed, its variant chosen on validation over all seeds."""
    mine = [point for point in points if point.defense == side.defense]
    if not mine:
        raise _Missing(f"{side.defense} is not run")
    if side.variant:
        mine = [point for point in mine if point.variant == side.variant]
        if not mine:
            raise _Missing(f"{side.defense} ({side.variant}) is not run")
        return mine[0]
    if len({point.variant for point in every if point.defense == side.defense}) == 1:
        return mine[0]
    variant = best_variant(side.defense, every, claim.keeping)
    found = next((point for point in mine if point.variant == variant), None)
    if found is None:
        raise _Missing(f"{side.defense} ({variant}) is not run")
    return found


def best_variant(defense: str, points: Iterable[Point], keeping: Keeping | None = None) -> str:
    """Return the variant of a defence with the best mean on validation over the seeds.

    Without ``keeping`` that is the mean of clean accuracy and of accuracy under a universal perturbation; with it, the
    latter alone among the variants that keep the clean accuracy, or else the former of all.

    Args:
        defense: its label.
        points: rows of one data set, architecture and kind of equality.
        keeping: which may be chosen.

    Raises:
        _Missing: the defence whose accuracy is to be kept is not run.
    """
    points = list(points)

    def mean(label: str, variant: str | None, metric: str) -> float:
        found = [
            point.values[metric].value
            for point in points
            if point.defense == label and point.variant in (variant, point.variant if variant is None else variant)
            if metric in point.values
        ]
        return statistics.fmean(found) if found else -math.inf

    variants = list(dict.fromkeys(point.variant for point in points if point.defense == defense))
    clean = {variant: mean(defense, variant, "train.validation_accuracy") for variant in variants}
    robust = {variant: 1 - mean(defense, variant, "train.validation_uer") for variant in variants}
    if keeping is not None:
        least = mean(keeping.than, None, "train.validation_accuracy") - keeping.drop
        if math.isinf(least):
            raise _Missing(f"{keeping.than}, whose accuracy is to be kept, is not run")
        kept = [variant for variant in variants if clean[variant] >= least]
        if kept:
            return max(kept, key=lambda variant: robust[variant])
        return max(variants, key=lambda variant: clean[variant])
    return max(variants, key=lambda variant: clean[variant] + robust[variant])


def front(points: Iterable[tuple[float, float]], *, across: int, along: int) -> list[tuple[float, float]]:
    """Return the Pareto front, by ascending first coordinate.

    Args:
        points: pairs of numbers.
        across: 1 if the first is better when higher, -1 when lower.
        along: likewise of the second.
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-across * point[0], -along * point[1])):
        if not found or along * y > along * found[-1][1]:
            found.append((x, y))
    return sorted(found)


def _between_fronts(claim: Claim, points: Sequence[Point]) -> _Effect:
    matched = str(claim.matched)
    fronts, censored = [], []
    for side in claim.sides:
        name = side.metric or str(claim.metric)
        run = [p for p in points if p.defense == side.defense and {name, matched} <= set(p.values)]
        mine = [p for p in run if learnt(p)]
        if not mine:
            raise _Missing(f"{side.defense} has not learnt" if run else f"{side.defense} is not run")
        pairs = [(p.values[matched].value, _on_scale(claim, p.values[name], side.defense, name)) for p in mine]
        censored.append(any(p.values[name].censored for p in mine))
        fronts.append(front(pairs, across=meaning(matched).better, along=meaning(name).better))
    low, high = max(one[0][0] for one in fronts), min(one[-1][0] for one in fronts)
    if low > high:
        raise _Missing(f"the fronts of {claim.of.defense} and {claim.sides[1].defense} share no {matched}")
    levels = [low + (high - low) * k / (LEVELS - 1) for k in range(LEVELS)]
    found = statistics.fmean(_at(fronts[0], level) - _at(fronts[1], level) for level in levels)
    return _Effect(found, more=censored[0], less=censored[1])


def _at(line: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate linearly."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return line[0][1] if x <= line[0][0] else line[-1][1]


def learnt(point: Point) -> bool:
    """Whether a model is better than one that always gives the most frequent class."""
    return "train.learnt" not in point.values or point.values["train.learnt"].value > 0


def _correlation(points: Sequence[Point], metric: str, with_: str) -> float:
    run = [point for point in points if {metric, with_} <= set(point.values)]
    mine = [point for point in run if learnt(point)]
    pairs = [(point.values[metric].value, point.values[with_].value) for point in mine]
    if len(pairs) < 4 or any(len({pair[k] for pair in pairs}) == 1 for k in (0, 1)):
        there = f"there are {len(pairs)}" if len(mine) == len(run) else f"{len(mine)} of {len(run)} have learnt"
        raise _Missing(f"a correlation of {metric} with {with_} needs 4 models that differ, and {there}")
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    return abs(float(spearman(first, second)))


def verdicts(
    claims: Mapping[str, Claim], points: Sequence[Point], ats: Sequence[str], places: Sequence[tuple[str, str]]
) -> list[Verdict]:
    """Judge every claim, at equal steps and at equal time; see :func:`judge`."""
    return [
        judge(name, claim, points, at, places)
        for name, claim in claims.items()
        for at in ats
        if at in (claim.at or ats)
    ]
