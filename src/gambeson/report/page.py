"""The pages: their data, and rendering to one HTML text with style and chart library inside."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

from gambeson.auditing import Check
from gambeson.base import count
from gambeson.report import charts, formatting, jacobian, pictures, scenes, summary, tables
from gambeson.report.charts import Chart
from gambeson.report.formatting import Facts, meaning_of_eps
from gambeson.report.loading import Folder
from gambeson.report.pictures import Example, Pattern
from gambeson.report.scenes import Scenes, Swatch
from gambeson.report.summary import Summary


def render(template: str, page: Any, *, plotly: bool = True) -> str:
    """Write a page. What comes from files is escaped; style, library and chart data are not."""
    from markupsafe import Markup

    library = ""
    if plotly:
        from plotly.offline import get_plotlyjs

        library = Markup(get_plotlyjs())
    found = _environment().get_template(f"{template}.html.j2")
    return found.render(page=page, icon=pictures.icon(), style=Markup(_text("style.css")), plotly=library)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tight"] = _tight
    return environment


def _tight(text: str) -> str:
    """Keep a number and its unit, and the two ends of an interval, on one line."""
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
    text = re.sub(r"(?<=\d) of 100\b", "\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}100", text)
    return re.sub(r"(\[[\d.]+), ([\d.]+\])", "\\1,\N{NO-BREAK SPACE}\\2", text)


def _text(name: str) -> str:
    return (files("gambeson.report") / name).read_text(encoding="utf-8")


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
    hue: str
    trusted: bool
    summary: Summary
    verdict: str
    """The verdict in full."""
    reasons: list[str]
    unchecked: list[str]
    patterns: list[Pattern]
    middle: Pattern
    """The pattern of the examples."""
    examples: list[Example]
    first: Example | None
    """The one that stands first: flipped by the pattern, if one of them is."""
    shown: str
    """What the examples are, and how many of all images are like them."""
    scenes: list[Scenes]
    """Of label maps, in place of the examples."""
    checks: list[Check]
    """Failed ones first, then passed ones, then those that do not apply."""
    jacobian: JacobianCharts
    facts: list[Facts]
    command: str
    """Command that reproduces the audit; empty where it was made by no command of its own."""

    @property
    def failed(self) -> bool:
        """Whether a check has failed."""
        return any(check.passed is False for check in self.checks)

    def tally(self) -> str:
        """Summarise the checks: passed, failed, not applicable, not run."""
        found = Counter(check.outcome for check in self.checks)
        rest = found["does not apply"]
        parts = [f"{found['passed']} passed"]
        parts += [f"{found['failed']} failed"] if found["failed"] else []
        parts += [f"{rest} {'does' if rest == 1 else 'do'} not apply"] if rest else []
        parts += [f"{found['not run']} not run"] if found["not run"] else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Page:
    """The page about one audit or more."""

    title: str
    answer: str
    """Compares several models; empty for one."""
    models: list[Model]
    norm: str
    strength: str
    """What eps measures."""
    colour: bool
    """Whether images have the channels red, green and blue."""
    delta: str
    """The error of eps_uni, in per cent."""
    tests: int
    glance: tables.Table
    curves: tables.Table
    controls: list[str]
    curve: Chart
    edits: tables.Table | None
    edited: Chart | None
    classes: list[tables.Table]
    attacks: list[tables.Table]
    jacobian: list[tables.Table]
    along: Chart | None
    small: bool
    """Whether images are small and enlarged."""
    unit: str
    """What is right or wrong: an image, or a pixel."""
    units: str
    """What rates are shares of."""
    legend: list[Swatch]
    """The colours of classes in label maps."""
    iou: tables.Table | None
    """Of label maps: the IoU of every class."""


def build(folders: Sequence[Folder], title: str | None, answer: str | None = None) -> Page:
    """Build the page's data from the audits."""
    first = folders[0].result
    norm = first.universal[0].norm
    eps = tables.common_eps(folders)
    what = folders[0].label if len(folders) == 1 else count(len(folders), "model")
    names = [control.name for folder in folders for point in folder.result.universal for control in point.controls]
    return Page(
        title=title or f"Robustness audit: {what} on {first.material.name}",
        answer=answer or ("" if len(folders) == 1 else summary.answer(folders, eps)),
        models=[_model(folder, index, norm) for index, folder in enumerate(folders)],
        norm=norm,
        strength=meaning_of_eps(norm),
        colour=len(first.material.shape) == 3 and first.material.shape[0] == 3,
        delta=f"{100 * first.eps_uni.delta:g}",
        tests=first.material.test,
        glance=tables.glance(folders, eps),
        curves=tables.curves(folders),
        controls=list(dict.fromkeys(names)),
        curve=charts.curve(folders, norm),
        edits=tables.edits(folders),
        edited=charts.edits(folders),
        classes=tables.classes(folders),
        attacks=[*tables.attacks(folders), *filter(None, [scenes.aims(folders)])],
        jacobian=jacobian.build(folders, norm),
        along=jacobian.along(folders, norm),
        small=max(first.material.shape[1:]) <= 96,
        unit=folders[0].unit,
        units=folders[0].units,
        legend=scenes.legend(folders),
        iou=scenes.ious(folders),
    )


def _model(folder: Folder, index: int, norm: str) -> Model:
    result, tensors = folder.result, folder.examples
    drawn = [
        pictures.pattern(delta, point.eps, norm, folder.label, f"UER {point.uer}", point.status)
        for point, delta in zip(result.universal, folder.deltas, strict=True)
    ]
    examples = pictures.examples(tensors, result.material.classes)
    reproduce = f"gambeson audit --config {shlex.quote(folder.path.resolve().name + '/run.yaml')} --out NEW"
    return Model(
        label=folder.label,
        hue=charts.hue(index),
        trusted=folder.trusted,
        summary=summary.summary(folder, norm),
        verdict=result.verdict.summary,
        reasons=result.verdict.reasons,
        unchecked=result.verdict.unchecked,
        patterns=drawn,
        middle=drawn[len(drawn) // 2],
        examples=examples,
        first=pictures.first_flipped(examples),
        shown=pictures.proportion(examples, result.middle.uer, result.clean.complement),
        scenes=scenes.build(folder, drawn, norm),
        checks=sorted(result.checks, key=lambda check: (False, True, None).index(check.passed)),
        jacobian=_jacobian(folder, index, norm),
        facts=formatting.collect(folder),
        command=reproduce if (folder.path / "run.yaml").is_file() else "",
    )


def _jacobian(folder: Folder, index: int, norm: str) -> JacobianCharts:
    found, direction = folder.result.jacobian, folder.direction
    shown = "" if direction is None else pictures.png(pictures.signed(direction, float(direction.abs().max())))
    return JacobianCharts(
        surface=jacobian.surface(folder, index, norm),
        singles=jacobian.singles(folder),
        images=found.surface.images if found and found.surface else 0,
        pairs=jacobian.pairs(folder, index),
        direction=shown,
        left_out=found.left_out if found else {},
        fixed_draw=found.fixed_draw if found else False,
    )
