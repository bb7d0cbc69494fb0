"""Tables: the models at a glance, every rate at every eps, and other attacks, noise and random models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gambeson.auditing.display import Attacked, worst_of
from gambeson.auditing.results import PerImageResult, RandomnessResult, TransferredResult
from gambeson.base import eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.attack_suite import AttackRound
from gambeson.evaluation.classes import ClassRates
from gambeson.evaluation.edits import EditedRates
from gambeson.evaluation.rates import Control
from gambeson.report.formatting import bound, decimal, interval, percent
from gambeson.report.loading import Folder
from gambeson.threat.edits import strength_of

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True)
class Cell:
    """One entry: the number, smaller lines below it, and whether no trusted model is clearly better."""

    main: str
    below: tuple[str, ...] = ()
    best: bool = False
    shade: str = ""
    """Colour behind it; none by default."""
    own: bool = False
    """Whether it is framed."""


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


def glance(folders: Sequence[Folder], eps: float | None) -> Table:
    """Build one line for each model, whose verdict is not part of it."""
    clean = _leaders(folders, [folder.result.clean for folder in folders], highest=True)
    uer = _leaders(folders, [folder.at(eps).uer if eps is not None else None for folder in folders])
    worst = [worst_of(folder.result) for folder in folders]
    alike = len({(a.attack, a.eps, a.accuracy.n) if a else None for a in worst}) == 1
    held = _leaders(folders, [a.accuracy if a and alike else None for a in worst], highest=True)
    sizes = [(folder.result.eps_uni.censored, folder.result.eps_uni.value) for folder in folders]
    largest = max((size for size, folder in zip(sizes, folders, strict=True) if folder.trusted), default=None)
    alike_delta = len({folder.result.eps_uni.delta for folder in folders}) == 1
    lines = []
    for k, folder in enumerate(folders):
        result = folder.result
        point = folder.at(eps)
        where = () if eps is not None else (f"eps {eps_text(point.eps)}",)
        main, *notes = bound(result.eps_uni)
        if not alike_delta:
            notes = [f"error of {percent(result.eps_uni.delta)}", *notes]
        if result.eps_adv is not None:
            notes.append(f"per image: {' '.join(bound(result.eps_adv)[:-1])}")
        best = len(folders) > 1 and folder.trusted and sizes[k] == largest
        cells = [
            rate_cell(result.clean, best=clean[k]),
            Cell(percent(point.uer.value), (interval(point.uer), *where), uer[k]),
            _attacked(worst[k], held[k], result.material.test),
            Cell(main, tuple(notes), best),
        ]
        if point.iou is not None and result.iou is not None:
            mean, clean_mean = point.iou.mean, result.iou.mean
            cells.insert(2, Cell(percent(mean.value), (interval(mean), f"clean {percent(clean_mean.value)}")))
        lines.append(Line(folder.label, result.subject.name, cells))
    uer_head = "UER at its middle eps" if eps is None else f"UER at eps {eps_text(eps)}"
    smallest = f"eps_uni({folders[0].result.eps_uni.delta:g})" if alike_delta else "eps_uni"
    head = ["Model", "Clean accuracy", uer_head, "Accuracy under per-image attacks", smallest]
    if folders[0].result.iou is not None:
        head.insert(3, "Mean IoU there")
    return Table("At a glance", head, [Group(None, lines)])


def grid(folders: Sequence[Folder]) -> list[float]:
    """Return every eps that some audit has, ascending."""
    return sorted({point.eps for folder in folders for point in folder.result.universal})


def curves(folders: Sequence[Folder]) -> Table:
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
    head = [f"eps {eps_text(eps)}" + (f"\n{decimal(eps)}" if decimal(eps) else "") for eps in grid(folders)]
    return Table("UER at every eps, beside the controls", ["Pattern", *head], groups)


def edits(folders: Sequence[Folder]) -> Table | None:
    """Build a line for each edit: the UER of each model, and below it the errors on clean images and under controls."""
    columns = [{one.edit: one for one in found.rates} if (found := f.result.edits) else {} for f in folders]
    if not any(columns):
        return None

    def cell(one: EditedRates | None) -> Cell:
        if one is None:
            return NONE
        worst = () if one.control is None else (f"strongest control {percent(one.control.value)}",)
        return Cell(percent(one.uer.value), (interval(one.uer), f"clean {percent(one.clean.value)}", *worst))

    lines = [Line(name, strength_of(name), [cell(column.get(name)) for column in columns]) for name in _keys(columns)]
    some = {folder.label: found for folder in folders if (found := folder.result.edits)}
    notes = [f"{label}: eps {eps_text(one.eps)}, {one.rates[0].uer.n:,} images." for label, one in some.items()]
    left = {text: why for found in some.values() for text, why in found.left_out.items()}
    notes += [f"{text} was left out: {why}." for text, why in left.items()]
    return _table(folders, "UER when images are edited after the pattern was added", "Edit", lines, " ".join(notes))


def classes(folders: Sequence[Folder]) -> list[Table]:
    """Build the error of each class, the worst first, and the AUC of two classes."""
    views = [folder.result.classes for folder in folders]
    if not any(views):
        return []
    columns = [{one.name: one for one in view.classes} if view else {} for view in views]
    worst = {name: max(c[name].uer.value for c in columns if name in c) for name in _keys(columns)}
    names = sorted(worst, key=lambda name: -worst[name])

    def cell(one: ClassRates | None) -> Cell:
        if one is None:
            return NONE
        own = () if one.own is None else (f"with its own pattern {percent(one.own.value)} {interval(one.own)}",)
        return Cell(percent(one.uer.value), (interval(one.uer), f"clean {percent(one.clean.value)}", *own))

    lines = [Line(name, "", [cell(column.get(name)) for column in columns]) for name in names[:_CLASSES]]
    note = "The intervals hold for all classes at once."
    if len(names) > _CLASSES:
        note = f"The {_CLASSES} of {len(names)} classes with the highest error. {note}"
    found = [_table(folders, "UER of each class at the middle eps", "Class", lines, note)]
    areas = [view.auc if view else None for view in views]
    if any(areas):
        rows = {"clean": [a and a.clean for a in areas], "with the pattern": [a and a.perturbed for a in areas]}
        lines = [Line(name, "", [rate_cell(rate) if rate else NONE for rate in some]) for name, some in rows.items()]
        note = "The share of pairs of an image of either class that the difference of the logits orders rightly."
        found.append(_table(folders, "Area under the ROC curve", "AUC", lines, note))
    return found


_CLASSES = 20


def _control(control: Control) -> Cell:
    if control.draws == 1:
        return rate_cell(control.worst)
    return Cell(percent(control.mean), (f"worst {percent(control.worst.value)}", interval(control.worst)))


def _attacked(found: Attacked | None, best: bool, tests: int) -> Cell:
    if found is None:
        return Cell(NONE.main, ("not measured",))
    name = "the attack suite" if found.attack == "standard" else found.attack
    some = () if found.accuracy.n == tests else (f"on {found.accuracy.n:,} images",)
    rate = found.accuracy
    return Cell(percent(rate.value), (interval(rate), f"{name}, eps {eps_text(found.eps)}", *some), best)


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


def attacks(folders: Sequence[Folder]) -> list[Table]:
    """Build the non-empty tables of other attacks: one column per model, one row per attack."""
    scaled = [make(folders) for make in (_per_image, _certified, _transferred)]
    found = [*scaled, _noise(folders), _draws(folders)]
    return [table for table in found if table is not None]


def _table(folders: Sequence[Folder], caption: str, name: str, lines: list[Line], note: str = "") -> Table:
    return Table(caption, [name, *(folder.label for folder in folders)], [Group(None, lines)], note)


def _per_image(folders: Sequence[Folder]) -> Table | None:
    columns = [{(a.attack, a.eps): a for a in folder.result.per_image} for folder in folders]
    if not any(columns):
        return None
    lines = [_clean(folders, "no attack", lambda folder: folder.result.clean)]
    for name, eps in _keys(columns):
        found = [column.get((name, eps)) for column in columns]
        title = "the attack suite" if name == "standard" else name
        cells = [_rate(f, a.accuracy if a else None) for f, a in zip(folders, found, strict=True)]
        lines.append(Line(title, f"eps {eps_text(eps)}", cells))
        rounds = [{turn.attack: turn for turn in (a.rounds if a else [])} for a in found]
        for attack in _keys(rounds):
            cells = [_round(turns.get(attack), a) for turns, a in zip(rounds, found, strict=True)]
            lines.append(Line(f"after {attack}", "", cells, minor=True))
        if any(a and a.maps for a in found):
            cells = [NONE if a is None or a.maps is None else rate_cell(a.maps.mean_iou) for a in found]
            lines.append(Line("mean IoU", "at its own worst case", cells, minor=True))
    has_suites = any(a.rounds for column in columns for a in column.values())
    note = "In a suite each attack takes on only the images that the ones before it left right." if has_suites else ""
    return _table(folders, "Accuracy when every image gets a perturbation of its own", "Attack", lines, note)


def _certified(folders: Sequence[Folder]) -> Table | None:
    columns = [{one.bounds.eps: one for one in folder.result.certified} for folder in folders]
    if not any(columns):
        return None
    lines = []
    for eps in _keys(columns):
        cells = []
        for one in (column.get(eps) for column in columns):
            ends = one and f"{percent(one.bounds.universal)} to {percent(one.attacked.value)}"
            each = (
                one and f"each by itself at least {percent(one.bounds.per_image.value)}, on {one.attacked.n:,} images"
            )
            cells.append(Cell(ends, (each,)) if ends and each else NONE)
        lines.append(Line(f"eps {eps_text(eps)}", "certified to attacked", cells))
    note = "No perturbation leaves less than is certified, and no bound can say more than an attack leaves."
    return _table(folders, "Between which ends the accuracy under any one pattern lies", "Radius", lines, note)


def _round(turn: AttackRound | None, of: PerImageResult | None) -> Cell:
    if turn is None or of is None:
        return NONE
    return Cell(percent(turn.accuracy.value), (f"broke {turn.broken:,} of {turn.tried:,}",))


def _transferred(folders: Sequence[Folder]) -> Table | None:
    def note(t: TransferredResult) -> str:
        number = "one for all images" if t.universal else "one per image"
        return f"crafted on {t.source}; {number}; eps {eps_text(t.eps)}"

    columns = [{(t.attack, note(t)): t.error for t in folder.result.transfer} for folder in folders]
    caption = "Error under perturbations that were crafted on another model"
    return _errors(folders, caption, "Attack", columns)


def _noise(folders: Sequence[Folder]) -> Table | None:
    meaning = {"gaussian": "standard deviation", "uniform": "half-width", "salt-and-pepper": "share of pixels"}
    columns = [
        {(c.noise.replace("-", " "), f"{meaning.get(c.noise, 'size')} {c.size:.3g}"): c.error for c in found}
        for found in (folder.result.corruption for folder in folders)
    ]
    return _errors(folders, "Error under plain noise, drawn anew for every image: no adversary", "Noise", columns)


def _errors(
    folders: Sequence[Folder], caption: str, head: str, columns: Sequence[Mapping[tuple[str, str], Rate]]
) -> Table | None:
    """A line for each name and note, below the error on clean images."""
    if not any(columns):
        return None
    lines = [_clean(folders, f"no {head.lower()}", lambda folder: folder.result.clean.complement)]
    for key in _keys(columns):
        cells = [_rate(folder, column.get(key)) for folder, column in zip(folders, columns, strict=True)]
        lines.append(Line(*key, cells))
    return _table(folders, caption, head, lines)


def _draws(folders: Sequence[Folder]) -> Table | None:
    found = [folder.result.randomness for folder in folders]
    if not any(found):
        return None

    def line(name: str, note: str, cell: Callable[[RandomnessResult], Cell]) -> Line:
        return Line(name, note, [cell(one) if one else Cell("not random") for one in found])

    lines = [
        line("mean of all passes", "± one standard deviation", lambda d: Cell(_spread(d), (f"{d.votes} passes",))),
        line("lowest and highest pass", "", lambda d: Cell(f"{percent(d.lowest)} to {percent(d.highest)}")),
        line("majority of the passes", "image by image", lambda d: rate_cell(d.majority)),
        line("randomness turned off", "", lambda d: rate_cell(d.noise_off) if d.noise_off else NONE),
    ]
    ways = [f"{folder.label}: {d.noise_off_by}" for folder, d in zip(folders, found, strict=True) if d]
    note = f"How it was turned off: {'; '.join(ways)}."
    return _table(folders, "Clean accuracy of random models, over passes of the same images", "Accuracy", lines, note)


def _spread(found: RandomnessResult) -> str:
    return f"{percent(found.mean)} ± {100 * found.spread:.1f}"


def _clean(folders: Sequence[Folder], name: str, rate: Callable[[Folder], Rate]) -> Line:
    return Line(name, "clean images", [rate_cell(rate(folder)) for folder in folders])


def _rate(folder: Folder, rate: Rate | None) -> Cell:
    return NONE if rate is None else rate_cell(rate, tests=folder.result.material.test)


def _keys(columns: Sequence[Mapping[KeyT, object]]) -> list[KeyT]:
    """The keys of all columns, in order of first appearance."""
    return list(dict.fromkeys(key for column in columns for key in column))
