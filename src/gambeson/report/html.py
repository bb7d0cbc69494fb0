"""From the page's data to one HTML text: the template, with its style and the chart's library inside it."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from gambeson.report.page import Page


def render(page: Page) -> str:
    """Write the page. What comes from files is escaped; style, library and chart data are not."""
    from plotly.offline import get_plotlyjs  # imported where it is used: attacking and training run without it

    return _template().render(page=page, style=Markup(_text("style.css")), plotly=Markup(get_plotlyjs()))


@cache
def _template() -> Template:
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
