"""Tables of per-image attacks, transfer, corruption noise, and the spread of random models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from gambeson.auditing.results import Corruption, PerImageResult, RandomnessResult, TransferredResult
from gambeson.evaluation import Rate
from gambeson.evaluation.attack_suite import AttackRound
from gambeson.report.formatting import EpsFormat, percent
from gambeson.report.loading import Folder
from gambeson.report.tables import NONE, Cell, Group, Line, Table, rate_cell

KeyT = TypeVar("KeyT", bound=Hashable)


def build(folders: Sequence[Folder], scale: EpsFormat) -> list[Table]:
    """Build the non-empty tables: one column per model, one row per attack."""
    found = [_per_image(folders, scale), _transferred(folders, scale), _noise(folders), _draws(folders)]
    return [table for table in found if table is not None]


def _table(folders: Sequence[Folder], caption: str, name: str, lines: list[Line], note: str = "") -> Table:
    return Table(caption, [name, *(folder.label for folder in folders)], [Group(None, lines)], note)


def _per_image(folders: Sequence[Folder], scale: EpsFormat) -> Table | None:
    columns = [{(a.attack, a.eps): a for a in folder.result.per_image} for folder in folders]
    if not any(columns):
        return None
    lines = [_clean(folders, "no attack", lambda folder: folder.result.clean)]
    for name, eps in _keys(columns):
        found = [column.get((name, eps)) for column in columns]
        title = "the attack suite" if name == "standard" else name
        lines.append(
            Line(
                title,
                f"eps {scale.text(eps)}",
                [_rate(f, a.accuracy if a else None) for f, a in zip(folders, found, strict=True)],
            )
        )
        rounds = [{turn.attack: turn for turn in (a.rounds if a else [])} for a in found]
        for attack in _keys(rounds):
            cells = [_round(turns.get(attack), a) for turns, a in zip(rounds, found, strict=True)]
            lines.append(Line(f"after {attack}", "", cells, minor=True))
    has_suites = any(a.rounds for column in columns for a in column.values())
    note = "In a suite each attack takes on only the images that the ones before it left right." if has_suites else ""
    return _table(folders, "Accuracy when every image gets a perturbation of its own", "Attack", lines, note)


def _round(turn: AttackRound | None, of: PerImageResult | None) -> Cell:
    if turn is None or of is None:
        return NONE
    return Cell(percent(turn.accuracy.value), (f"broke {turn.broken:,} of {turn.tried:,}",))


def _transferred(folders: Sequence[Folder], scale: EpsFormat) -> Table | None:
    def key(t: TransferredResult) -> tuple[str, str, bool, float]:
        return (t.source, t.attack, t.universal, t.eps)

    columns = [{key(t): t for t in folder.result.transfer} for folder in folders]
    if not any(columns):
        return None
    lines = [_clean(folders, "no attack", lambda folder: folder.result.clean.complement)]
    for found in _keys(columns):
        source, attack, universal, eps = found
        note = f"crafted on {source}; {'one for all images' if universal else 'one per image'}; eps {scale.text(eps)}"
        items = [column.get(found) for column in columns]
        cells = [_rate(folder, t.error if t else None) for folder, t in zip(folders, items, strict=True)]
        lines.append(Line(attack, note, cells))
    return _table(folders, "Error under perturbations that were crafted on another model", "Attack", lines)


def _noise(folders: Sequence[Folder]) -> Table | None:
    def key(noise: Corruption) -> tuple[str, float]:
        return (noise.noise, noise.size)

    columns = [{key(noise): noise for noise in folder.result.corruption} for folder in folders]
    if not any(columns):
        return None
    meaning = {"gaussian": "standard deviation", "uniform": "half-width", "salt-and-pepper": "share of pixels"}
    lines = [_clean(folders, "no noise", lambda folder: folder.result.clean.complement)]
    for found in _keys(columns):
        note = f"{meaning.get(found[0], 'size')} {found[1]:.3g}"
        items = [column.get(found) for column in columns]
        cells = [_rate(folder, c.error if c else None) for folder, c in zip(folders, items, strict=True)]
        lines.append(Line(found[0].replace("-", " "), note, cells))
    return _table(folders, "Error under plain noise, drawn anew for every image: no adversary", "Noise", lines)


def _draws(folders: Sequence[Folder]) -> Table | None:
    found = [folder.result.randomness for folder in folders]
    if not any(found):
        return None

    def line(name: str, note: str, cell: Callable[[RandomnessResult], Cell]) -> Line:
        return Line(name, note, [cell(one) if one else Cell("not random") for one in found])

    lines = [
        line(
            "mean of all passes",
            "± one standard deviation",
            lambda d: Cell(_spread(d), (f"{d.votes} passes",)),
        ),
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
