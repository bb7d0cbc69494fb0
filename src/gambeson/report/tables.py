"""The two tables: every model at a glance, and every rate at every eps with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gambeson.evaluation import Rate
from gambeson.evaluation.results import Control
from gambeson.report.folders import Folder
from gambeson.report.words import Scale, bound, interval, percent

_NONE = "\N{EN DASH}"
"""Stands where an audit has no number."""


@dataclass(frozen=True)
class Cell:
    """One entry: the number, smaller lines below it, and whether no trusted model is clearly better."""

    main: str
    below: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a table; ``note`` explains its name."""

    name: str
    note: str
    cells: list[Cell]


def common_eps(folders: Sequence[Folder]) -> float | None:
    """Return the middle one of the eps that all audits have, or None where they share none."""
    shared = set.intersection(*({point.eps for point in folder.result.universal} for folder in folders))
    return sorted(shared)[len(shared) // 2] if shared else None


def glance_head(folders: Sequence[Folder], eps: float | None, scale: Scale) -> list[str]:
    """Return the headings of :func:`glance`, between the model and its verdict."""
    deltas = {folder.result.eps_uni.delta for folder in folders}
    uer = "UER at its middle eps" if eps is None else f"UER at eps {scale.text(eps)}"
    found = f"eps_uni({deltas.pop():g})" if len(deltas) == 1 else "eps_uni"
    return ["Clean accuracy", uer, "Accuracy under PGD", found]


def glance(folders: Sequence[Folder], eps: float | None, scale: Scale) -> list[Line]:
    """Build one line for each model."""
    clean = _leaders(folders, [folder.result.clean for folder in folders], highest=True)
    uer = _leaders(folders, [folder.at(eps).uer if eps is not None else None for folder in folders])
    tests = {tuple((attack.attack, attack.eps) for attack in folder.result.per_image) for folder in folders}
    alike = len(tests) == 1 and len(folders[0].result.per_image) == 1
    pgd = _leaders(folders, [f.result.per_image[0].accuracy if alike else None for f in folders], highest=True)
    sizes = [(folder.result.eps_uni.censored, folder.result.eps_uni.value) for folder in folders]
    largest = max((size for size, folder in zip(sizes, folders, strict=True) if folder.trusted), default=None)
    alike_delta = len({folder.result.eps_uni.delta for folder in folders}) == 1
    lines = []
    for k, folder in enumerate(folders):
        result = folder.result
        point = folder.at(eps)
        where = () if eps is not None else (f"eps {scale.text(point.eps)}",)
        attacks = [(f"{a.attack}, eps {scale.text(a.eps)}", a.accuracy) for a in result.per_image]
        main, note = bound(result.eps_uni)
        best = len(folders) > 1 and folder.trusted and sizes[k] == largest
        cells = [
            Cell(percent(result.clean.value), (interval(result.clean),), clean[k]),
            Cell(percent(point.uer.value), (interval(point.uer), *where), uer[k]),
            _attacks(attacks, pgd[k]),
            Cell(main, (note,) if alike_delta else (f"error of {percent(result.eps_uni.delta)}", note), best),
        ]
        lines.append(Line(folder.label, result.subject.name, cells))
    return lines


def grid(folders: Sequence[Folder]) -> list[float]:
    """Return every eps that some audit has, ascending."""
    return sorted({point.eps for folder in folders for point in folder.result.universal})


def curves(folders: Sequence[Folder]) -> list[list[Line]]:
    """Build, for each model, a line for the crafted pattern and one for each control, over all eps."""
    points = [{point.eps: point for point in folder.result.universal} for folder in folders]
    best = {eps: _leaders(folders, [p[eps].uer if eps in p else None for p in points]) for eps in grid(folders)}
    groups = []
    for k, folder in enumerate(folders):
        crafted = [
            Cell(percent(points[k][eps].uer.value), (interval(points[k][eps].uer),), best[eps][k])
            if eps in points[k]
            else Cell(_NONE)
            for eps in grid(folders)
        ]
        lines = [Line("crafted", "the attack's pattern", crafted)]
        for control in folder.result.universal[0].controls:
            name = control.name
            cells = []
            for eps in grid(folders):
                found = [c for c in points[k][eps].controls if c.name == name] if eps in points[k] else []
                cells.append(_control(found[0]) if found else Cell(_NONE))
            note = "one fixed pattern" if control.draws == 1 else f"mean of {control.draws} draws; the worst below"
            lines.append(Line(name.replace("-", " "), note, cells))
        groups.append(lines)
    return groups


def _control(control: Control) -> Cell:
    if control.draws == 1:
        return Cell(percent(control.worst.value), (interval(control.worst),))
    return Cell(percent(control.mean), (f"worst {percent(control.worst.value)}", interval(control.worst)))


def _attacks(found: list[tuple[str, Rate]], best: bool) -> Cell:
    if not found:
        return Cell(_NONE, ("not measured",))
    if len(found) == 1:
        ((name, rate),) = found
        return Cell(percent(rate.value), (interval(rate), name), best)
    return Cell("", tuple(f"{percent(rate.value)} {interval(rate)} {name}" for name, rate in found))


def _leaders(folders: Sequence[Folder], rates: Sequence[Rate | None], *, highest: bool = False) -> list[bool]:
    """Mark the best rate of the trusted models, and every one whose interval overlaps with that one's."""
    known = [rate for rate, folder in zip(rates, folders, strict=True) if rate is not None and folder.trusted]
    if len(folders) == 1 or not known:
        return [False] * len(folders)
    top = (max if highest else min)(known, key=lambda rate: rate.value)
    return [
        rate is not None and folder.trusted and rate.low <= top.high and rate.high >= top.low
        for rate, folder in zip(rates, folders, strict=True)
    ]
