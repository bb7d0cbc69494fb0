"""Studies: what is trained on what, how it is measured, and what is claimed, written as YAML."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from gambeson import data as data_room
from gambeson.base import Config, Number, UserError, read_settings, unknown_name
from gambeson.defenses.registry import DEFENSES
from gambeson.studies.audits import AuditMeasure
from gambeson.studies.claims import At, Claim
from gambeson.studies.measures import (
    AccuracyMeasure,
    AttackMeasure,
    EpsUniMeasure,
    JacobianMeasure,
    SuiteMeasure,
    named,
)
from gambeson.studies.trials import Choice, NumberChoice, Range, ends
from gambeson.threat import Eps

Size = Annotated[int, Field(ge=1)]
AnyMeasure = Annotated[
    AuditMeasure | AccuracyMeasure | AttackMeasure | SuiteMeasure | EpsUniMeasure | JacobianMeasure,
    Field(discriminator="kind"),
]
"""A measurement, distinguished by ``kind``."""


CELLS = "cells"
"""The folder of results, beside those of studies."""
Kind = Literal["cost", "search", "lengths", "train", "measure"]
"""What a cell of a study does."""
_MOST_SEEDS = 1000


def _folder(name: str) -> str:
    if name.lower() == CELLS:
        raise ValueError(f"{CELLS} is the folder of all studies' results: choose another name")
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_folder)]
"""The name of a study, and of its folder."""


def _seeds(value: Any) -> Any:
    if isinstance(value, int) and value > _MOST_SEEDS:
        raise ValueError(f"there are {value}: give at most {_MOST_SEEDS}")
    return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


def _each(value: Any) -> Any:
    """Write a claim against several defences as one against each, named after it."""
    if not isinstance(value, dict):
        return value
    claims: dict[str, Any] = {}
    for name, claim in value.items():
        several = claim.get("to") if isinstance(claim, dict) else None
        if not isinstance(several, list | tuple) or not several:
            claims[name] = claim
            continue
        for one in several:
            label = one.get("defense") if isinstance(one, dict) else one
            key, statement = f"{name} against {label}", str(claim.get("statement", "")).replace("{to}", str(label))
            if key in value or key in claims:
                raise ValueError(f"two claims are called {key!r}: list each defence once")
            claims[key] = claim | {"to": one, "statement": statement}
    return claims


def _once(what: str, values: Sequence[Any]) -> None:
    """Refuse a value that stands twice."""
    for k, value in enumerate(values):
        if value in values[:k]:
            raise ValueError(f"{what}: {value} is given twice")


class StudyData(Config):
    """A data set of a study."""

    name: data_room.Name
    """As ``gambeson train --data`` takes it."""
    eps: Eps
    """The radius that is attacked, and trained against where a defence sets none."""
    train: Size | None = None
    """Training images, a stratified sample; None: all."""
    validation: Size | None = None
    """Validation images, likewise."""
    test: Size | None = None
    """Test images, likewise."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Fields of the recipe that differ from the study's."""

    def load(self, *, fewer: bool = False) -> data_room.Dataset:
        """Load it, with the splits cut to size.

        Args:
            fewer: take all of a split that has fewer images than were asked for, instead of refusing it.

        Raises:
            UserError: a split has fewer images.
        """
        whole = data_room.load(self.name)

        def some(part: data_room.Split, size: int | None) -> data_room.Split:
            if size is not None and size > len(part):
                if fewer:
                    return part
                raise UserError(f"{part.name} has {len(part)} images, and the study asks for {size}: ask for fewer")
            return part if size is None else part.sample(size)

        return data_room.Dataset(
            name=whole.name,
            train=some(whole.train, self.train),
            validation=some(whole.validation, self.validation),
            test=some(whole.test, self.test),
            classes=whole.classes,
        )


class StudyModel(Config):
    """An architecture of a study."""

    name: str
    """As ``gambeson train --model`` takes it."""
    data: tuple[str, ...] = ()
    """The data sets that it is trained on; empty: all."""


class StudyDefense(Config):
    """A defence of a study, or several that differ in some settings."""

    name: str
    """A registered name, or ``FILE.py:CLASS``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its settings. One that needs an eps and has none gets that of the data."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Settings with several values, of which every combination is trained. ``times_eps`` multiplies the eps."""
    space: dict[str, Choice] = Field(default_factory=dict)
    """Settings that the search's trials choose, the same for all of the grid: some values, or a range."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Fields of the recipe that differ from the study's and the data's."""
    data: tuple[str, ...] = ()
    """The data sets that it is trained on; empty: all."""
    models: tuple[str, ...] = ()
    """The architectures, likewise."""


class Search(Config):
    """The search of learning rate and warm-up, the same for every defence, and once for all of its grid.

    Every combination is tried; or, with ``trials``, so many as Optuna proposes (extra ``search``), of these, of fields
    of the recipe and of settings of the defence.

    A candidate's score is the mean of two accuracies on validation: clean, and under one universal perturbation of the
    data's eps; with ``per_image`` of three, the last under PGD. The rule is ours: a defence costs clean accuracy, so
    that this alone would choose the weakest training.
    """

    lr: NumberChoice
    """Learning rates; with trials also a range."""
    warmup: NumberChoice = (0.0,)
    """Epochs of warm-up, likewise."""
    trials: Size | None = None
    """Candidates, the same number for every defence, the first with the settings as they are. None: every combination
    of learning rate and warm-up."""
    space: dict[str, Choice] = Field(default_factory=dict)
    """With trials: fields of the recipe that they choose as well. Those of a defence are in its ``space``."""
    per_image: bool = False
    """Whether the score counts the accuracy under PGD of 10 steps, image by image, as well."""
    share: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Epochs of each candidate, as a share of the recipe's."""
    train: Size | None = None
    """Training images of each candidate, a stratified sample, or all where there are fewer; None: those of the data."""
    lengths: tuple[Annotated[Number, Field(gt=0)], ...] = ()
    """Multiples of the recipe's epochs, ascending, that the chosen one is also trained for, on all images, to see from
    where on the validation score is flat. No training waits for this."""
    tolerance: Annotated[Number, Field(gt=0)] = 0.01
    """Gain of the score from one length to the next below which it is flat."""

    @model_validator(mode="after")
    def _ranges_need_trials(self) -> Search:
        if self.trials is None and (self.space or isinstance(self.lr, Range) or isinstance(self.warmup, Range)):
            raise ValueError("a space and ranges are only for trials: give their number, search.trials")
        if twice := {"lr", "warmup", "epochs", "milestones"} & set(self.space):
            raise ValueError(f"{sorted(twice)[0]} is not of the space: lr and warmup stand beside it, epochs are given")
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Search:
        if (least := min(ends(self.lr))) <= 0:
            raise ValueError(f"learning rates are positive, got {least:g}: leave it out of search.lr")
        if (least := min(ends(self.warmup))) < 0:
            raise ValueError(f"a warm-up takes 0 epochs or more, got {least:g}: leave it out of search.warmup")
        for name, choice in {"lr": self.lr, "warmup": self.warmup, **self.space}.items():
            _once(f"{name} of the search", ends(choice))
        if any(first >= then for first, then in itertools.pairwise(self.lengths)):
            raise ValueError(f"expected ascending lengths, got {', '.join(f'{one:g}' for one in self.lengths)}")
        return self


class Resources(Config):
    """What a cell asks of a Ray cluster."""

    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] = 0.0
    """May be a part of one, such as 0.25, for small networks."""
    memory: Annotated[Number, Field(ge=0)] = 0.0
    """GiB; 0: not stated."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a cell that crashed, or whose machine was lost, is tried again."""


class Study(Config):
    """A study: what is trained on what, how it is measured, and what is claimed of it."""

    kind: Literal["study"] = "study"
    name: Name
    summary: str = ""
    data: Annotated[tuple[StudyData, ...], Field(min_length=1)]
    models: Annotated[tuple[Annotated[StudyModel, BeforeValidator(named)], ...], Field(min_length=1)]
    defenses: Annotated[dict[str, Annotated[StudyDefense, BeforeValidator(named)]], Field(min_length=1)]
    """By label."""
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds), Field(min_length=1)] = (0, 1, 2)
    """The seeds, or their number."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`gambeson.training.Recipe` for all trainings."""
    search: Search | None = None
    at: Annotated[tuple[At, ...], Field(min_length=1)] = ("steps",)
    """What trainings have in common: optimiser steps, training time, or both, one after the other. At equal time only
    what claims read is trained and measured, and its clean accuracy."""
    reference: str = ""
    """With ``seconds``: the defence whose training time all others get as well, by more or fewer epochs."""
    measures: Annotated[dict[str, AnyMeasure], Field(min_length=1)]
    """By label."""
    claims: Annotated[dict[str, Claim], BeforeValidator(_each)] = Field(default_factory=dict)
    """By name. One whose ``to`` lists several defences stands for one claim against each; ``{to}`` in its statement is
    the defence's label."""
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _known_defences(cls, fields: Any) -> Any:
        defenses = fields.get("defenses") if isinstance(fields, dict) else None
        for entry in defenses.values() if isinstance(defenses, dict) else ():
            name = entry if isinstance(entry, str) else entry.get("name") if isinstance(entry, dict) else None
            if isinstance(name, str):
                DEFENSES.get(name)
        return fields

    @field_validator("measures")
    @classmethod
    def _own_labels(cls, measures: dict[str, Any]) -> dict[str, Any]:
        for label in measures:
            if label in get_args(Kind):
                raise ValueError(f"a measure is called {label!r}, as a study's own cells are: give it another label")
            if not label or "." in label:
                raise ValueError(
                    f"a measure is called {label!r}: give it a label without a dot, as metrics are LABEL.NAME"
                )
        return measures

    @field_validator("seeds")
    @classmethod
    def _no_twins(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError(f"expected different numbers from 0 on, got {', '.join(map(str, seeds))}")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> Study:
        sets, nets, labels = [one.name for one in self.data], [one.name for one in self.models], list(self.defenses)
        claims = list(self.claims.values())
        about = [*self.models, *self.defenses.values(), *claims]
        sources = [one.source for one in self.measures.values() if isinstance(one, AttackMeasure) and one.source]
        if "seconds" in self.at and not self.reference:
            raise ValueError("at equal time all train as long as one defence: name it as the reference")
        labelled = [self.reference] if "seconds" in self.at else []
        labelled += sources + [name for one in (*claims, *self.measures.values()) for name in one.defenses]
        measured = [metric.split(".")[0] for claim in claims for metric in claim.metrics]
        for kind, names, known in (
            ("data set of the study", [name for one in about for name in getattr(one, "data", ())], sets),
            ("model of the study", [name for one in about for name in getattr(one, "models", ())], nets),
            ("defence of the study", labelled, labels),
            ("measure of the study", measured, [*self.measures, "train"]),
        ):
            for name in names:
                if name not in known:
                    raise unknown_name(kind, name, known)
        _once("at", self.at)
        for name, claim in self.claims.items():
            claim.check(self.seeds)
            if missing := [at for at in claim.at if at not in self.at]:
                raise ValueError(f"the claim {name} is at equal {missing[0]}, and the study is not: add it to its at")
        _once("data set", sets)
        _once("model", nets)
        for label, measure in self.measures.items():
            if unknown := sorted(set(measure.seeds) - set(self.seeds)):
                raise ValueError(f"the measure {label} is of seed {unknown[0]}, which the study has not")
            for one in self.data:
                measure.check(one.eps)
        for label, defense in self.defenses.items():
            for name, values in [*defense.grid.items(), *((k, ends(choice)) for k, choice in defense.space.items())]:
                _once(f"{name} of {label}", values)
            if twice := defense.grid.keys() & defense.settings.keys():
                raise ValueError(f"{sorted(twice)[0]} of {label} is in its grid: leave it out of its settings")
            if defense.space and (self.search is None or self.search.trials is None):
                raise ValueError(f"the space of {label} is for the search's trials: give search.trials")
            if twice := defense.space.keys() & (defense.grid.keys() | {"name"}):
                raise ValueError(f"{sorted(twice)[0]} of {label} is in its grid: leave it out of its space")
        return self

    @classmethod
    def load(cls, file: Path) -> Study:
        """Read a study file.

        Raises:
            UserError: it is none, or a setting is wrong.
        """
        return cls(**read_settings(file, "study"))
