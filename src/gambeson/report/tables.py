"""What tables are made of, and the two main ones: the models at a glance, and every rate at every eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gambeson.auditing.results import PerImageResult
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import Control
from gambeson.report.formatting import EpsFormat, bound, interval, percent
from gambeson.report.loading import Folder


@dataclass(frozen=True)
class Cell:
    """One entry: the number, smaller lines below it, and whether no trusted model is clearly better."""

    main: str
    below: tuple[str, ...] = ()
    best: bool = False


NONE = Cell("\N{EN DASH}")
"""Stands where an audit has no number."""


@dataclass(frozen=True)
class Line:
    """One line of a table; ``note`` explains its name, a ``minor`` one stands back."""

    name: str
    note: str
    cells: list[Cell]
    minor: bool = False


@dataclass(frozen=True)
class Group:
    """Lines of a table; ``model`` is the index of the one that they are about, None where columns are models."""

    model: int | None
    lines: list[Line]


@dataclass(frozen=True)
class Table:
    """A table of numbers."""

    caption: str
    head: list[str]
    """The first heading is that of the lines' names. A second line, after a line break, is written small."""
    groups: list[Group]
    note: str = ""
    """Stands below it."""


def rate_cell(rate: Rate, *, best: bool = False, tests: int | None = None) -> Cell:
    """Write a rate with its interval below, and the number of images where it is not that of the page."""
    more = () if tests in (None, rate.n) else (f"on {rate.n:,} images",)
    return Cell(percent(rate.value), (interval(rate), *more), best)


def common_eps(folders: Sequence[Folder]) -> float | None:
    """Return the middle one of the eps that all audits have, or None where they share none."""
    shared = set.intersection(*({point.eps for point in folder.result.universal} for folder in folders))
    return sorted(shared)[len(shared) // 2] if shared else None


def glance_head(folders: Sequence[Folder], eps: float | None, scale: EpsFormat) -> list[str]:
    """Return the headings of :func:`glance`, between the model and its verdict."""
    deltas = {folder.result.eps_uni.delta for folder in folders}
    uer = "UER at its middle eps" if eps is None else f"UER at eps {scale.text(eps)}"
    found = f"eps_uni({deltas.pop():g})" if len(deltas) == 1 else "eps_uni"
    return ["Clean accuracy", uer, "Accuracy, attacked image by image", found]


def glance(folders: Sequence[Folder], eps: float | None, scale: EpsFormat) -> list[Line]:
    """Build one line for each model."""
    clean = _leaders(folders, [folder.result.clean for folder in folders], highest=True)
    uer = _leaders(folders, [folder.at(eps).uer if eps is not None else None for folder in folders])
    worst = [_worst(folder.result.per_image) for folder in folders]
    alike = len({(a.attack, a.eps, a.accuracy.n) if a else None for a in worst}) == 1
    held = _leaders(folders, [a.accuracy if a and alike else None for a in worst], highest=True)
    sizes = [(folder.result.eps_uni.censored, folder.result.eps_uni.value) for folder in folders]
    largest = max((size for size, folder in zip(sizes, folders, strict=True) if folder.trusted), default=None)
    alike_delta = len({folder.result.eps_uni.delta for folder in folders}) == 1
    lines = []
    for k, folder in enumerate(folders):
        result = folder.result
        point = folder.at(eps)
        where = () if eps is not None else (f"eps {scale.text(point.eps)}",)
        main, *notes = bound(result.eps_uni)
        if not alike_delta:
            notes = [f"error of {percent(result.eps_uni.delta)}", *notes]
        if result.eps_adv is not None:
            notes.append(f"image by image: {' '.join(bound(result.eps_adv)[:-1])}")
        best = len(folders) > 1 and folder.trusted and sizes[k] == largest
        cells = [
            rate_cell(result.clean, best=clean[k]),
            Cell(percent(point.uer.value), (interval(point.uer), *where), uer[k]),
            _attacked(worst[k], scale, held[k], result.material.test),
            Cell(main, tuple(notes), best),
        ]
        lines.append(Line(folder.label, result.subject.name, cells))
    return lines


def grid(folders: Sequence[Folder]) -> list[float]:
    """Return every eps that some audit has, ascending."""
    return sorted({point.eps for folder in folders for point in folder.result.universal})


def curves(folders: Sequence[Folder], scale: EpsFormat) -> Table:
    """Build, for each model, a line for the crafted pattern and one for each control, over all eps."""
    points = [{point.eps: point for point in folder.result.universal} for folder in folders]
    best = {eps: _leaders(folders, [p[eps].uer if eps in p else None for p in points]) for eps in grid(folders)}
    groups = []
    for k, folder in enumerate(folders):
        chosen = [
            rate_cell(points[k][eps].uer, best=best[eps][k]) if eps in points[k] else NONE for eps in grid(folders)
        ]
        lines = [Line("crafted", "the attack's pattern", chosen)]
        if any(point.crafted for point in points[k].values()):
            own = [rate_cell(p.crafted or p.uer) if (p := points[k].get(eps)) else NONE for eps in grid(folders)]
            lines = [
                Line("strongest", "of all patterns, as validation sees it", chosen),
                Line("crafted", "the attack's pattern", own, minor=True),
            ]
        for control in folder.result.universal[0].controls:
            name = control.name
            cells = []
            for eps in grid(folders):
                found = [c for c in points[k][eps].controls if c.name == name] if eps in points[k] else []
                cells.append(_control(found[0]) if found else NONE)
            note = "one fixed pattern" if control.draws == 1 else f"mean of {control.draws} draws; the worst below"
            lines.append(Line(name.replace("-", " "), note, cells, minor=True))
        groups.append(Group(k, lines))
    head = [
        f"eps {scale.text(eps)}" + (f"\n{scale.decimal(eps)}" if scale.decimal(eps) else "") for eps in grid(folders)
    ]
    return Table("UER at every eps, beside the controls", ["Pattern", *head], groups)


def _control(control: Control) -> Cell:
    if control.draws == 1:
        return rate_cell(control.worst)
    return Cell(percent(control.mean), (f"worst {percent(control.worst.value)}", interval(control.worst)))


def _worst(found: Sequence[PerImageResult]) -> PerImageResult | None:
    """Return the attack that leaves least right, with the interval of the lowest of so many."""
    if not found:
        return None
    lowest = Rate.lowest(one.accuracy for one in found)
    return min(found, key=lambda one: one.accuracy.value).model_copy(update={"accuracy": lowest})


def _attacked(found: PerImageResult | None, scale: EpsFormat, best: bool, tests: int) -> Cell:
    if found is None:
        return Cell(NONE.main, ("not measured",))
    name = "the attack suite" if found.attack == "standard" else found.attack
    some = () if found.accuracy.n == tests else (f"on {found.accuracy.n:,} images",)
    rate = found.accuracy
    return Cell(percent(rate.value), (interval(rate), f"{name}, eps {scale.text(found.eps)}", *some), best)


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
