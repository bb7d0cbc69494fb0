"""The page as data: what the template writes down, in the order in which it is read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from gambeson.auditing import Check
from gambeson.report import attacks, charts, pictures, slope_charts, slope_tables, tables, words
from gambeson.report.charts import Chart
from gambeson.report.facts import Facts, collect
from gambeson.report.folders import Folder
from gambeson.report.words import Scale


@dataclass(frozen=True)
class Picture:
    """A picture with the words that stand under it and in its place."""

    source: str
    alt: str
    title: str
    scale: str
    rate: str


@dataclass(frozen=True)
class Answer:
    """What a model said about one picture; ``name`` is empty where the answer is a map of labels."""

    source: str
    alt: str
    name: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A test image, clean and perturbed."""

    truth: str
    clean: Answer
    perturbed: Answer


@dataclass(frozen=True)
class Slopes:
    """Charts and pictures of one model's slopes; empty where the audit has none."""

    surface: Chart | None
    singles: list[str]
    images: int
    """Behind the mean surface."""
    pairs: Chart | None
    direction: str
    """The best shared direction, as a picture."""
    left_out: dict[str, str]
    fixed_draw: bool


@dataclass(frozen=True)
class Model:
    """Everything about one model."""

    label: str
    architecture: str
    hue: str
    trusted: bool
    summary: str
    reasons: list[str]
    patterns: list[Picture]
    middle: str
    """The eps of the examples."""
    examples: list[Example]
    checks: list[Check]
    """Failed ones first, then passed ones, then those that do not apply."""
    slopes: Slopes
    facts: list[Facts]
    command: str
    """How to run the audit again; empty where its folder holds no settings."""

    def tally(self) -> str:
        """Say how many checks came out how."""
        passed, failed, rest = (sum(check.passed is state for check in self.checks) for state in (True, False, None))
        parts = [f"{passed} passed"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{rest} {'does' if rest == 1 else 'do'} not apply"] if rest else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    icon: str
    setting: str
    answer: str
    models: list[Model]
    scale: Scale
    delta: str
    """The error that eps_uni is searched for, as a share in per cent."""
    tests: int
    glance_head: list[str]
    glance: list[tables.Line]
    curves: tables.Table
    controls: list[str]
    curve: Chart
    attacks: list[tables.Table]
    slopes: list[tables.Table]
    along: Chart | None
    charts: list[Chart]
    """All of them, in the order of the page."""
    small: bool
    """Whether images have so few pixels that they are enlarged."""


def build(folders: Sequence[Folder], title: str | None) -> Page:
    """Lay out the audits."""
    first = folders[0].result
    scale = Scale(first.universal[0].norm, len(first.material.shape) == 3 and first.material.shape[0] == 3)
    eps = tables.common_eps(folders)
    what = folders[0].label if len(folders) == 1 else words.count(len(folders), "model")
    models = [_model(folder, index, scale) for index, folder in enumerate(folders)]
    curve, along = charts.curve(folders, scale), slope_charts.along(folders, scale)
    every = [curve, along, *(chart for model in models for chart in (model.slopes.surface, model.slopes.pairs))]
    names = [control.name for folder in folders for point in folder.result.universal for control in point.controls]
    return Page(
        title=title or f"Robustness audit: {what} on {first.material.name}",
        icon=pictures.icon(),
        setting=words.setting(folders),
        answer=words.answer(folders, eps, scale),
        models=models,
        scale=scale,
        delta=f"{100 * first.eps_uni.delta:g}",
        tests=first.material.test,
        glance_head=tables.glance_head(folders, eps, scale),
        glance=tables.glance(folders, eps, scale),
        curves=tables.curves(folders, scale),
        controls=list(dict.fromkeys(names)),
        curve=curve,
        attacks=attacks.build(folders, scale),
        slopes=slope_tables.build(folders, scale),
        along=along,
        charts=[chart for chart in every if chart is not None],
        small=max(first.material.shape[1:]) <= 96,
    )


def _model(folder: Folder, index: int, scale: Scale) -> Model:
    result = folder.result
    reproduce = f"gambeson audit --config {shlex.quote(folder.path.resolve().name + '/run.yaml')} --out NEW"
    return Model(
        label=folder.label,
        architecture=result.subject.name,
        hue=charts.hue(index),
        trusted=folder.trusted,
        summary=result.verdict.summary,
        reasons=result.verdict.reasons,
        patterns=_patterns(folder, scale),
        middle=scale.text(result.middle.eps),
        examples=_examples(folder),
        checks=sorted(result.checks, key=lambda check: (False, True, None).index(check.passed)),
        slopes=_slopes(folder, index, scale),
        facts=collect(folder, scale),
        command=reproduce if folder.has_settings else "",
    )


def _slopes(folder: Folder, index: int, scale: Scale) -> Slopes:
    found, direction = folder.result.slopes, folder.direction
    shown = "" if direction is None else pictures.png(pictures.signed(direction, float(direction.abs().max())))
    return Slopes(
        surface=slope_charts.surface(folder, index, scale),
        singles=slope_charts.singles(folder),
        images=found.surface.images if found and found.surface else 0,
        pairs=slope_charts.pairs(folder, index),
        direction=shown,
        left_out=found.left_out if found else {},
        fixed_draw=found.fixed_draw if found else False,
    )


def _patterns(folder: Folder, scale: Scale) -> list[Picture]:
    found = []
    for point, delta in zip(folder.result.universal, folder.deltas, strict=True):
        white = pictures.reach(delta, point.eps, point.norm)
        size = scale.text(white) if point.norm == "inf" else f"{white:.3g}"
        found.append(
            Picture(
                source=pictures.png(pictures.signed(delta, white)),
                alt=f"Universal perturbation for {folder.label} at eps {scale.text(point.eps)}",
                title=f"eps {scale.text(point.eps)}" + ("" if point.status == "done" else f" ({point.status})"),
                scale=f"{'each channel: ' if scale.colour else ''}black -{size}, grey 0, white +{size}",
                rate=f"UER {point.uer}",
            )
        )
    return found


def _examples(folder: Folder) -> list[Example]:
    tensors, classes = folder.examples, folder.result.material.classes
    maps = tensors["labels"].ndim > 1

    def answer(image: str, prediction: str, k: int, kind: str) -> Answer:
        source = pictures.png(tensors[image][k])
        if maps:
            return Answer(source, f"Test image {k + 1}, {kind}", "", False)
        said, truth = int(tensors[prediction][k]), int(tensors["labels"][k])
        return Answer(source, f"Test image of class {classes[truth]}, {kind}", classes[said], said == truth)

    return [
        Example(
            truth="" if maps else classes[int(tensors["labels"][k])],
            clean=answer("images", "predictions", k, "clean"),
            perturbed=answer("perturbed", "perturbed_predictions", k, "perturbed"),
        )
        for k in range(len(tensors["images"]))
    ]
