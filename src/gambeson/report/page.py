"""The page: its data, and rendering to one HTML text with style and chart library inside."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from gambeson.auditing import Check
from gambeson.report import attacks, charts, formatting, images, jacobian, tables
from gambeson.report.charts import Chart
from gambeson.report.formatting import EpsFormat
from gambeson.report.loading import Folder
from gambeson.report.metadata import Facts, collect
from gambeson.tasks import of as task_of


def render(page: Page) -> str:
    """Write the page. What comes from files is escaped; style, library and chart data are not."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return _template().render(page=page, style=Markup(_text("style.css")), plotly=Markup(get_plotlyjs()))


@cache
def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tight"] = _tight
    return environment.get_template("template.html.j2")


def _tight(text: str) -> str:
    """Keep a number and its unit, and the two ends of an interval, on one line."""
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
    return re.sub(r"(\[[\d.]+), ([\d.]+\])", "\\1,\N{NO-BREAK SPACE}\\2", text)


def _text(name: str) -> str:
    return (files("gambeson.report") / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """A picture with its caption and alternative text."""

    source: str
    alt: str
    title: str
    scale: str
    rate: str


@dataclass(frozen=True)
class Answer:
    """A model's prediction for one picture; ``name`` is empty for label maps."""

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
class JacobianCharts:
    """Charts and pictures of one model's Jacobian analysis; empty where the audit has none."""

    surface: Chart | None
    singles: list[str]
    images: int
    """Number of images of the mean surface."""
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
    jacobian: JacobianCharts
    facts: list[Facts]
    command: str
    """Command that reproduces the audit; empty without settings."""

    def tally(self) -> str:
        """Summarise the checks: passed, failed, not applicable."""
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
    scale: EpsFormat
    delta: str
    """The error of eps_uni, in per cent."""
    tests: int
    glance_head: list[str]
    glance: list[tables.Line]
    curves: tables.Table
    controls: list[str]
    curve: Chart
    attacks: list[tables.Table]
    jacobian: list[tables.Table]
    along: Chart | None
    charts: list[Chart]
    """In the order of the page."""
    small: bool
    """Whether images are small and enlarged."""


def build(folders: Sequence[Folder], title: str | None) -> Page:
    """Build the page's data from the audits."""
    first = folders[0].result
    scale = EpsFormat(first.universal[0].norm, len(first.material.shape) == 3 and first.material.shape[0] == 3)
    eps = tables.common_eps(folders)
    what = folders[0].label if len(folders) == 1 else formatting.count(len(folders), "model")
    models = [_model(folder, index, scale) for index, folder in enumerate(folders)]
    curve, along = charts.curve(folders, scale), jacobian.along(folders, scale)
    every = [curve, along, *(chart for model in models for chart in (model.jacobian.surface, model.jacobian.pairs))]
    names = [control.name for folder in folders for point in folder.result.universal for control in point.controls]
    return Page(
        title=title or f"Robustness audit: {what} on {first.material.name}",
        icon=images.icon(),
        setting=formatting.setting(folders),
        answer=formatting.answer(folders, eps, scale),
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
        jacobian=jacobian.build(folders, scale),
        along=along,
        charts=[chart for chart in every if chart is not None],
        small=max(first.material.shape[1:]) <= 96,
    )


def _model(folder: Folder, index: int, scale: EpsFormat) -> Model:
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
        jacobian=_jacobian(folder, index, scale),
        facts=collect(folder, scale),
        command=reproduce if folder.has_settings else "",
    )


def _jacobian(folder: Folder, index: int, scale: EpsFormat) -> JacobianCharts:
    found, direction = folder.result.jacobian, folder.direction
    shown = "" if direction is None else images.png(images.signed(direction, float(direction.abs().max())))
    return JacobianCharts(
        surface=jacobian.surface(folder, index, scale),
        singles=jacobian.singles(folder),
        images=found.surface.images if found and found.surface else 0,
        pairs=jacobian.pairs(folder, index),
        direction=shown,
        left_out=found.left_out if found else {},
        fixed_draw=found.fixed_draw if found else False,
    )


def _patterns(folder: Folder, scale: EpsFormat) -> list[Picture]:
    found = []
    for point, delta in zip(folder.result.universal, folder.deltas, strict=True):
        white = images.reach(delta, point.eps, point.norm)
        size = scale.text(white) if point.norm == "inf" else f"{white:.3g}"
        found.append(
            Picture(
                source=images.png(images.signed(delta, white)),
                alt=f"Universal perturbation for {folder.label} at eps {scale.text(point.eps)}",
                title=f"eps {scale.text(point.eps)}" + ("" if point.status == "done" else f" ({point.status})"),
                scale=f"{'each channel: ' if scale.colour else ''}black -{size}, grey 0, white +{size}",
                rate=f"UER {point.uer}",
            )
        )
    return found


def _examples(folder: Folder) -> list[Example]:
    tensors, classes = folder.examples, folder.result.material.classes
    maps = not task_of(tensors["labels"]).per_image_label

    def answer(image: str, prediction: str, k: int, kind: str) -> Answer:
        source = images.png(tensors[image][k])
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
