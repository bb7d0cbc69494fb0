"""The matrix of a study: its rows, and the cells that they are made of, each with its address."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from gambeson.base import UserError, contents
from gambeson.base.config import parse_number
from gambeson.base.contents import texts
from gambeson.defenses.registry import DEFENSES
from gambeson.models.registry import MODELS
from gambeson.studies.checks import check_claims
from gambeson.studies.claims import At, Claim
from gambeson.studies.code import code_hash
from gambeson.studies.measures import AttackMeasure
from gambeson.studies.study import Kind, Study, StudyData, StudyDefense, StudyModel
from gambeson.studies.trials import ends
from gambeson.training import Recipe, TrainRun

HOLDOUT = 1000
"""Added to the seed of a model that examples are transferred from, so that it is never the attacked one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where a cell stands in the matrix."""

    data: str
    model: str
    defense: str
    """Its label in the study."""
    variant: str
    """The values of its grid, such as ``sigma 0.5``; empty without one."""
    at: At
    seed: int
    rank: tuple[int, ...]
    """Place in the matrix."""

    @property
    def title(self) -> str:
        """Name in messages."""
        variant = f" ({self.variant})" if self.variant else ""
        at = "" if self.at == "steps" else ", equal time"
        return f"{self.defense}{variant} on {self.data}, {self.model}, seed {self.seed}{at}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work whose result is stored."""

    kind: Kind
    row: Row
    settings: dict[str, Any]
    """All that decides the result, as plain data."""
    modules: tuple[str, ...]
    """The modules that make it; see :mod:`gambeson.studies.code`."""
    needs: tuple[Cell, ...] = ()
    """Cells whose results it uses."""
    label: str = ""
    """Of a measurement, its name in the study."""
    measure: Any = None
    """The measurement."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What the files hold that the settings name (:func:`gambeson.base.contents`)."""

    @cached_property
    def address(self) -> str:
        """Name of its folder: a hash of settings, the files that they name, code, and the cells that it needs."""
        content = {
            "kind": self.kind,
            "settings": self.settings,
            "code": code_hash(self.modules),
            "needs": [cell.address for cell in self.needs],
        }
        if self.files:
            content["files"] = dict(self.files)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """Name in messages."""
        return f"{self.label or self.kind} of {self.row.title}"


@dataclass(frozen=True)
class Matrix:
    """The cells of a study."""

    study: Study

    @cached_property
    def _known(self) -> dict[str, str]:
        """What files hold: looked up once, since many cells name the same."""
        return {}

    def _cell(self, **fields: Any) -> Cell:
        return Cell(files=contents(fields["settings"], self._known), **fields)

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell once, each after those that it needs, the most informative first.

        On one data set and architecture after the other, at equal steps and then at equal time, come the cells of the
        first claim, seed by seed, those of the second, and so on, and then what no claim reads: the first verdict comes
        as early as it can.

        Raises:
            UserError: a setting of a defence or a recipe is wrong.
        """
        found: dict[str, Cell] = {}
        claims = list(self.study.claims.values())
        ranked: list[tuple[tuple[int, ...], Cell]] = []
        for row, cells in self.table:
            read = [self._reads(claim, row) for claim in claims]
            place, seed, rest = row.rank[:3], row.rank[3], row.rank[4:]
            for label, cell in cells.items():
                first = next((k for k, labels in enumerate(read) if label in labels), len(claims))
                ranked.append(((*place, first + (label == "lengths"), seed, *rest), cell))

        def add(cell: Cell) -> None:
            for need in cell.needs:
                add(need)
            found.setdefault(cell.address, cell)

        for _, cell in sorted(ranked, key=lambda pair: pair[0]):
            add(cell)
        return list(found.values())

    def _reads(self, claim: Claim, row: Row) -> set[str]:
        """Labels of what a claim reads of a row."""
        asked = ((row.at, claim.at), (row.data, claim.data), (row.model, claim.models))
        if any(name not in (some or (name,)) for name, some in asked):
            return set()
        return claim.reads(row.defense, row.variant)

    @cached_property
    def table(self) -> list[tuple[Row, dict[str, Cell]]]:
        """The rows of the matrix, each with its training (``train``) and its measurements by label.

        At equal steps, that of the first variant and seed also has the trainings of other lengths (``lengths``).

        Raises:
            UserError: as :attr:`cells`, and for a claim about what is not measured.
        """
        rows = [self._row(row, spec) for row, spec in self._rows()]
        table = [(row, cells) for row, cells in rows if cells]
        check_claims(self.study, table)
        return table

    def _rows(self) -> Iterator[tuple[Row, _Spec]]:
        for (d, data), (m, model), (f, (label, defense)) in itertools.product(
            enumerate(self.study.data), enumerate(self.study.models), enumerate(self.study.defenses.items())
        ):
            if any(name not in (wanted or (name,)) for name, wanted in _filters(data, model, defense)):
                continue
            for v, (variant, settings) in enumerate(_variants(defense, data)):
                for (a, at), (s, seed) in itertools.product(enumerate(self.study.at), enumerate(self.study.seeds)):
                    rank = (d, m, a, s, v, f)
                    row = Row(
                        data=data.name, model=model.name, defense=label, variant=variant, at=at, seed=seed, rank=rank
                    )
                    yield row, _Spec(data, model, defense, settings)

    def _row(self, row: Row, spec: _Spec) -> tuple[Row, dict[str, Cell]]:
        wanted = self._wanted(row)
        if not wanted:
            return row, {}
        train = self._train(row, spec)
        cells = {"train": train}
        if self.study.search is not None and self.study.search.lengths and row.rank[2:5] == (0, 0, 0):
            cells["lengths"] = self._lengths(row, spec, train.needs[0])
        for label, measure in self.study.measures.items():
            if label not in wanted:
                continue
            needs = [train]
            if isinstance(measure, AttackMeasure) and measure.source:
                needs.append(self._source(row, spec, measure.source))
            content = {
                "measure": measure.model_dump(mode="json", exclude={"defenses", "seeds"}),
                "data": _size(spec.data),
                "seed": row.seed,
            }
            cells[label] = self._cell(
                kind="measure",
                row=row,
                label=label,
                measure=measure,
                settings=content,
                modules=(type(measure).__module__, *measure.modules()),
                needs=tuple(needs),
            )
        return row, cells

    def _wanted(self, row: Row) -> set[str]:
        """Labels of the cells of a row."""
        found = {"train"}
        for label, measure in self.study.measures.items():
            if row.defense in (measure.defenses or (row.defense,)) and row.seed in (measure.seeds or (row.seed,)):
                found.add(label)
        if row.at == "steps" or not self.study.claims:
            return found
        read = {label for claim in self.study.claims.values() for label in self._reads(claim, row)}
        clean = {label for label, measure in self.study.measures.items() if measure.kind == "accuracy"}
        return found & (read | clean) if read else set()

    def _source(self, row: Row, spec: _Spec, label: str) -> Cell:
        """The training of the model that examples are transferred from: of another seed, at equal steps."""
        defense = self.study.defenses[label]
        settings = next(_variants(defense, spec.data))[1]
        other = replace(row, defense=label, variant="", at="steps", seed=row.seed + HOLDOUT)
        return self._train(other, _Spec(spec.data, spec.model, defense, settings))

    def _train(self, row: Row, spec: _Spec) -> Cell:
        needs: list[Cell] = []
        content: dict[str, Any] = {"run": self._run(row, spec), "data": _size(spec.data)}
        modules = _modules(spec)
        if self.study.search is not None:
            needs.append(self._search(row, spec))
        if row.at == "seconds" and row.defense != self.study.reference:
            standard = self.study.defenses[self.study.reference]
            theirs = _Spec(spec.data, spec.model, standard, next(_variants(standard, spec.data))[1])
            content["epochs of"] = self._run(row, theirs)["recipe"]["epochs"]
            reference = replace(row, defense=self.study.reference, variant="")
            for place, one in ((row, spec), (reference, theirs)):
                settings = {"run": self._run(row, one) | {"seed": 0}, "data": content["data"]}
                at_steps = replace(place, at="steps")
                # What trials choose of a defence may change what a step costs.
                chosen = (self._search(at_steps, one),) if one.defense.space else ()
                needs.append(
                    self._cell(kind="cost", row=at_steps, settings=settings, modules=_modules(one), needs=chosen)
                )
        return self._cell(kind="train", row=row, settings=content, modules=modules, needs=tuple(needs))

    def _search(self, row: Row, spec: _Spec) -> Cell:
        """One for all variants of a defence, with the settings of the middle one."""
        assert self.study.search is not None
        asked = self.study.search.plain()
        few, whole = asked.pop("train"), _size(spec.data)
        asked.pop("lengths"), asked.pop("tolerance")
        middle = self._middle(spec)
        if asked["trials"] is None:
            asked.pop("trials"), asked.pop("space")
        else:
            asked["space"] = {"recipe": asked["space"], "settings": spec.defense.plain()["space"]}
            self._check_space(row, middle)
        run = self._run(row, middle) | {"seed": HOLDOUT}
        settings = {"run": run, "data": whole | ({} if few is None else {"train": few}), "search": asked}
        place = replace(row, variant="", at="steps")
        return self._cell(kind="search", row=place, settings=settings, modules=_modules(middle))

    def _check_space(self, row: Row, spec: _Spec) -> None:
        """Raise where a training would not take what a trial may choose."""
        assert self.study.search is not None
        for name, choice in self.study.search.space.items():
            for value in ends(choice):
                defense = spec.defense.model_copy(update={"recipe": {**spec.defense.recipe, name: value}})
                self._run(row, replace(spec, defense=defense))
        for name, choice in spec.defense.space.items():
            for value in ends(choice):
                self._run(row, replace(spec, settings={**spec.settings, name: value}))

    def _lengths(self, row: Row, spec: _Spec, search: Cell) -> Cell:
        """How the score of validation grows with the epochs, for the search's choice on all images."""
        assert self.study.search is not None
        asked = self.study.search.plain()
        asked = {name: asked[name] for name in ("lengths", "tolerance", "per_image")}
        settings = {"run": search.settings["run"], "data": _size(spec.data), "search": asked}
        return self._cell(kind="lengths", row=search.row, settings=settings, modules=search.modules, needs=(search,))

    def _middle(self, spec: _Spec) -> _Spec:
        variants = [settings for _, settings in _variants(spec.defense, spec.data)]
        return replace(spec, settings=variants[len(variants) // 2])

    def _run(self, row: Row, spec: _Spec) -> dict[str, Any]:
        """The settings of a training, checked, without the device."""
        recipe = self.study.recipe | spec.data.recipe | spec.defense.recipe
        try:
            plain = _checked(json.dumps([spec.data.name, spec.model.name, spec.settings, recipe]))
        except UserError as error:
            raise UserError(f"the defence {row.defense!r} of the study {self.study.name}: {error}") from None
        return {**json.loads(plain), "seed": row.seed}


@cache
def _checked(settings: str) -> str:
    """The settings of a training with all defaults, as JSON."""
    data, model, defense, recipe = json.loads(settings)
    run = TrainRun(data=data, model=model, defense=defense, recipe=Recipe(**recipe))
    run.defense.check(run.recipe.batch_size)
    return json.dumps({key: value for key, value in run.plain().items() if key != "device"})


@dataclass(frozen=True)
class _Spec:
    data: StudyData
    model: StudyModel
    defense: StudyDefense
    settings: dict[str, Any]
    """Name and settings of the defence, with those of the grid."""


def _size(data: StudyData) -> dict[str, Any]:
    """What decides the images and the radius."""
    return {key: value for key, value in data.plain().items() if key != "recipe"}


def _filters(data: StudyData, model: StudyModel, defense: StudyDefense) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (data.name, model.data), (data.name, defense.data), (model.name, defense.models)


def _variants(defense: StudyDefense, data: StudyData) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the grid, with its name and its settings."""
    for values in itertools.product(*defense.grid.values()):
        chosen: Mapping[str, Any] = dict(zip(defense.grid, values, strict=True))
        try:
            factor = float(parse_number(chosen.get("times_eps", 1)))
        except (TypeError, ValueError):
            raise UserError(f"times_eps of {defense.name} is {chosen['times_eps']!r}: give numbers") from None
        eps = {"eps": data.eps * factor} if _takes_eps(defense.name) else {}
        given = {key: value for key, value in chosen.items() if key != "times_eps"}
        variant = ", ".join(f"{key.replace('times_eps', 'eps x')} {value}" for key, value in chosen.items())
        yield variant, {"name": defense.name, **eps, **defense.settings, **given}


def _modules(spec: _Spec) -> tuple[str, ...]:
    """The modules that make a training: the loop, and whatever its settings name of defences and networks."""
    named = {_module(name) for name in texts([spec.model.name, spec.settings])}
    return ("gambeson.studies.trainings", *sorted(named - {""}))


@cache
def _module(name: str) -> str:
    """The module that registers a defence or a network; empty for any other text."""
    base, _, factor = name.rpartition("x")
    for registry in (DEFENSES, MODELS):
        for known in {name, base if factor else name} & set(registry.names()):
            target: Any = registry.get(known).target
            return str(getattr(target, "func", target).__module__)
    return ""


@cache
def _takes_eps(defense: str) -> bool:
    return "eps" in DEFENSES.get(defense).settings
