"""The chart of UER against eps, and common parts of charts as plotly figures with alternative text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gambeson.base import eps_text
from gambeson.evaluation import Rate
from gambeson.report.formatting import decimal, meaning_of_eps, percent
from gambeson.report.loading import Folder

HUES = ("#0072b2", "#c4500a", "#007a5a", "#a8487f", "#8a6d00", "#3a3a3a")
"""Distinguishable with all common kinds of colour blindness, with a contrast of at least 4.5 : 1 on white."""
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
_DASHES = {"random-sign": "dash", "chessboard": "dot"}
_TOPS = (5, 10, 20, 50, 100)
"""Ends of the axis of rates, in per cent: the first that holds them all, so that small slopes are seen."""
_INK, _FAINT = "#1c2430", "#e3e7ec"
AXIS: dict[str, Any] = {
    "gridcolor": _FAINT,
    "zeroline": False,
    "linecolor": "#8b95a3",
    "ticks": "outside",
    "fixedrange": True,
    "automargin": True,
}
"""Common settings of axes."""
LEGEND: dict[str, Any] = {"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0, "xanchor": "left"}
"""Common place of legends, below the chart."""


@dataclass(frozen=True)
class Chart:
    """A chart of the page."""

    name: str
    """Id of its element."""
    figure: str
    """JSON that is safe inside a script element."""
    alternative: str
    """Alternative text."""


def hue(index: int) -> str:
    """Return the colour of the model at ``index``, the same everywhere in the page."""
    return HUES[index % len(HUES)]


def symbol(index: int) -> str:
    """Return the marker of the model at ``index``: no two of 36 have both marker and colour in common."""
    return MARKERS[(index + index // len(HUES)) % len(MARKERS)]


def figure(folders: Sequence[Folder], norm: str) -> dict[str, Any]:
    """Build data and layout: for every model a band, its controls, and its line on top."""
    traces: list[dict[str, Any]] = []
    for index, folder in enumerate(folders):
        traces += [*_band(folder, index), *_controls(folder, index), _line(folder, index)]
    return {"data": traces, "layout": _layout(folders, norm)}


def embed(figure: dict[str, Any]) -> str:
    """Write the figure as JSON that is safe inside a script element."""
    text = json.dumps(figure, sort_keys=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plain_layout(height: int) -> dict[str, Any]:
    """Return the base layout of all charts."""
    return {
        "autosize": True,
        "height": height,
        "margin": {"l": 56, "r": 20, "t": 34, "b": 56},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "dragmode": False,
        "hoverlabel": {
            "align": "left",
            "bgcolor": "white",
            "bordercolor": "#8b95a3",
            "font": {"color": _INK},
        },
        "xaxis": dict(AXIS),
        "yaxis": dict(AXIS),
    }


def curve(folders: Sequence[Folder], norm: str) -> Chart:
    """Draw UER against eps for every model."""
    return Chart("chart", embed(figure(folders, norm)), alternative(folders))


def alternative(folders: Sequence[Folder]) -> str:
    """Return the alternative text of the chart."""
    parts = []
    for folder in folders:
        last, clean = folder.result.universal[-1], folder.result.clean.complement
        parts.append(f"{folder.label} from {clean} without a pattern to {last.uer} at eps {eps_text(last.eps)}")
    return f"UER: {'; '.join(parts)}."


def edits(folders: Sequence[Folder]) -> Chart | None:
    """Draw the UER of every model after each edit, beside its error on clean images and under controls."""
    some = [(k, folder, found) for k, folder in enumerate(folders) if (found := folder.result.edits) is not None]
    if not some:
        return None
    names = list(dict.fromkeys(one.edit for _, _, found in some for one in found.rates))
    traces, parts, every = [], [], list[Rate]()
    for k, folder, found in some:
        kinds = {
            "strongest control": {one.edit: one.control for one in found.rates if one.control is not None},
            "clean error": {one.edit: one.clean for one in found.rates},
            "UER": {one.edit: one.uer for one in found.rates},
        }
        for said, rates in kinds.items():
            every += rates.values()
            dash = {"strongest control": "dash", "clean error": "dot"}.get(said)
            look: dict[str, Any] = {"line": {"color": hue(k), "width": 1.4, "dash": dash}}
            if dash is None:
                marker = {"symbol": symbol(k), "size": 9, "color": hue(k)}
                look = {"mode": "markers", "marker": marker, "showlegend": True, "error_y": _arms([*rates.values()])}
            text = [
                f"{escape(folder.label)}<br>{name}<br>{said} {rate}<br>n = {rate.n:,}" for name, rate in rates.items()
            ]
            heights = [100 * rate.value for rate in rates.values()]
            traces.append(_trace(folder, k, said, list(rates), heights, text=text, **look))
        least = min(found.rates, key=lambda one: one.harm.value)
        parts.append(
            f"{folder.label} from {found.rates[0].uer} without an edit; {least.edit} leaves least, {least.uer}"
        )
    layout = {
        **plain_layout(440),
        "legend": {**LEGEND, "y": -0.45},
        "xaxis": {**AXIS, "type": "category", "categoryarray": names, "categoryorder": "array", "tickangle": -45},
        "yaxis": _shares(f"{folders[0].units} it gets wrong (%)", every),
    }
    return Chart("edited", embed({"data": traces, "layout": layout}), f"UER after edits: {'; '.join(parts)}.")


def _arms(rates: Sequence[Rate]) -> dict[str, Any]:
    """Return the intervals of rates as error bars, in per cent."""
    arms = {way: [100 * abs(getattr(rate, way) - rate.value) for rate in rates] for way in ("high", "low")}
    return {"type": "data", "symmetric": False, "array": arms["high"], "arrayminus": arms["low"]}


def _shares(title: str, rates: Sequence[Rate]) -> dict[str, Any]:
    """Return an axis of shares in per cent that holds all rates."""
    top = next(top for top in _TOPS if 100 * max(rate.high for rate in rates) <= top or top == _TOPS[-1])
    return {
        **AXIS,
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "range": [0, 1.02 * top],
        "tickvals": [top * k / 5 for k in range(6)],
    }


def _points(folder: Folder) -> tuple[list[float], list[Rate]]:
    """Every eps and its rate, starting with the clean error at eps 0."""
    points = folder.result.universal
    return [0.0, *(p.eps for p in points)], [folder.result.clean.complement, *(p.uer for p in points)]


def _trace(
    folder: Folder, index: int, role: str, x: Sequence[float | str], y: list[float], **more: Any
) -> dict[str, Any]:
    name = escape(folder.label)  # plotly renders names as simple HTML
    found = {"type": "scatter", "legendgroup": str(index), "name": name, "meta": role, "showlegend": False}
    return found | {"mode": "lines", "x": x, "y": y, "hovertemplate": "%{text}<extra></extra>"} | more


def _band(folder: Folder, index: int) -> list[dict[str, Any]]:
    eps, rates = _points(folder)
    if len(rates) == 2:
        return []
    edge = [100 * rate.high for rate in rates] + [100 * rate.low for rate in reversed(rates)]
    look = {"fill": "toself", "fillcolor": soft(hue(index)), "line": {"width": 0}, "hoverinfo": "skip"}
    return [_trace(folder, index, "band", eps + eps[::-1], edge, **look)]


def _line(folder: Folder, index: int) -> dict[str, Any]:
    eps, rates = _points(folder)
    text = [_hover(folder, eps, f"UER {rate}", rate) for eps, rate in zip(eps, rates, strict=True)]
    look = {"line": {"color": hue(index), "width": 2.5}, "mode": "lines+markers", "showlegend": True}
    if len(rates) == 2:  # nothing is known between a single eps and 0
        look["mode"] = "markers"
        look["error_y"] = _arms(rates)
    look |= {"marker": {"symbol": MARKERS[index % len(MARKERS)], "size": 9}}
    return _trace(folder, index, "line", eps, [100 * rate.value for rate in rates], text=text, **look)


def _controls(folder: Folder, index: int) -> list[dict[str, Any]]:
    points, clean = folder.result.universal, folder.result.clean.complement
    traces = []
    for name in [control.name for control in points[0].controls]:
        found = [(point.eps, control) for point in points for control in point.controls if control.name == name]
        text = [_hover(folder, 0.0, f"clean error {clean}", clean)]
        for eps, control in found:
            mean = "" if control.draws == 1 else f"mean of {control.draws} draws {percent(control.mean)}<br>worst "
            text.append(_hover(folder, eps, f"{escape(name)}: {mean}{control.worst}", control.worst))
        line = {"color": hue(index), "width": 1.4, "dash": _DASHES.get(name, "dashdot")}
        mode = {"mode": "markers", "marker": {"symbol": "line-ew-open", "size": 9}} if len(points) == 1 else {}
        heights = [100 * clean.value, *(100 * control.mean for _, control in found)]
        traces.append(
            _trace(folder, index, "control", [0.0, *(eps for eps, _ in found)], heights, text=text, line=line, **mode)
        )
    return traces


def _hover(folder: Folder, eps: float, said: str, rate: Rate) -> str:
    both = f"{eps_text(eps)} ({decimal(eps)})" if decimal(eps) else eps_text(eps)
    return f"{escape(folder.label)}<br>eps {both}<br>{said}<br>n = {rate.n:,}"


def _layout(folders: Sequence[Folder], norm: str) -> dict[str, Any]:
    grid = sorted({point.eps for folder in folders for point in folder.result.universal})
    texts = [eps_text(eps) for eps in grid]
    # Short labels, so that they fit side by side on a phone.
    short = all(text.endswith("/255") for text in texts)
    title = f"eps: {meaning_of_eps(norm)}<br>(pixels run from 0 to 1)"
    if short:
        title = f"eps, in 1/255 of the range of pixels:<br>{meaning_of_eps(norm)}"
    return {
        **plain_layout(480),
        "legend": LEGEND,
        "xaxis": {
            **AXIS,
            "title": {"text": title, "standoff": 10, "font": {"size": 13}},
            "range": [0, grid[-1] * 1.03 or 1],
            "tickvals": [0.0, *grid],
            "ticktext": ["0", *(text.removesuffix("/255") if short else text for text in texts)],
        },
        "yaxis": _shares(
            f"UER: {folders[0].units} it gets wrong (%)", [rate for folder in folders for rate in _points(folder)[1]]
        ),
    }


def soft(colour: str, alpha: float = 0.16) -> str:
    """Return the colour with transparency."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
