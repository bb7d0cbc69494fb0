"""The chart of UER against eps, and common parts of charts as plotly figures with alternative text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gambeson.evaluation import Rate
from gambeson.report.formatting import EpsFormat, percent
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


def figure(folders: Sequence[Folder], scale: EpsFormat) -> dict[str, Any]:
    """Build data and layout: for every model a band, its controls, and its line on top."""
    traces: list[dict[str, Any]] = []
    for index, folder in enumerate(folders):
        traces += [_band(folder, index), *_controls(folder, index, scale), _line(folder, index, scale)]
    return {"data": traces, "layout": _layout(folders, scale)}


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


def curve(folders: Sequence[Folder], scale: EpsFormat) -> Chart:
    """Draw UER against eps for every model."""
    return Chart("chart", embed(figure(folders, scale)), alternative(folders, scale))


def alternative(folders: Sequence[Folder], scale: EpsFormat) -> str:
    """Return the alternative text of the chart."""
    parts = []
    for folder in folders:
        last, clean = folder.result.universal[-1], folder.result.clean.complement
        parts.append(f"{folder.label} from {clean} without a pattern to {last.uer} at eps {scale.text(last.eps)}")
    return f"UER: {'; '.join(parts)}."


def _points(folder: Folder) -> tuple[list[float], list[Rate]]:
    """Every eps and its rate, starting with the clean error at eps 0."""
    points = folder.result.universal
    return [0.0, *(p.eps for p in points)], [folder.result.clean.complement, *(p.uer for p in points)]


def _trace(folder: Folder, index: int, role: str, **more: Any) -> dict[str, Any]:
    # Plotly renders names as simple HTML, so labels must be escaped.
    name = escape(folder.label)
    return {
        "type": "scatter",
        "legendgroup": str(index),
        "name": name,
        "meta": role,
        "showlegend": False,
        **more,
    }


def _band(folder: Folder, index: int) -> dict[str, Any]:
    eps, rates = _points(folder)
    edge = [100 * rate.high for rate in rates] + [100 * rate.low for rate in reversed(rates)]
    return _trace(
        folder,
        index,
        "band",
        x=eps + eps[::-1],
        y=edge,
        fill="toself",
        fillcolor=soft(hue(index)),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
    )


def _line(folder: Folder, index: int, scale: EpsFormat) -> dict[str, Any]:
    eps, rates = _points(folder)
    name = escape(folder.label)
    return _trace(
        folder,
        index,
        "line",
        x=eps,
        y=[100 * rate.value for rate in rates],
        text=[
            f"{name}<br>eps {_both(x, scale)}<br>UER {rate}<br>n = {rate.n:,}"
            for x, rate in zip(eps, rates, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
        mode="lines+markers",
        line={"color": hue(index), "width": 2.5},
        marker={"symbol": MARKERS[index % len(MARKERS)], "size": 9},
        showlegend=True,
    )


def _controls(folder: Folder, index: int, scale: EpsFormat) -> list[dict[str, Any]]:
    points, clean = folder.result.universal, folder.result.clean.complement
    traces = []
    for name in [control.name for control in points[0].controls]:
        x, y, text = (
            [0.0],
            [100 * clean.value],
            [f"{escape(folder.label)}<br>clean error {clean}<br>n = {clean.n:,}"],
        )
        for point in points:
            for control in (c for c in point.controls if c.name == name):
                x.append(point.eps)
                y.append(100 * control.mean)
                mean = "" if control.draws == 1 else f"mean of {control.draws} draws {percent(control.mean)}<br>worst "
                text.append(
                    f"{escape(folder.label)}: {escape(name)}<br>eps {_both(point.eps, scale)}<br>"
                    f"{mean}{control.worst}<br>n = {control.worst.n:,}"
                )
        line = {"color": hue(index), "width": 1.4, "dash": _DASHES.get(name, "dashdot")}
        more = {
            "x": x,
            "y": y,
            "text": text,
            "hovertemplate": "%{text}<extra></extra>",
            "mode": "lines",
            "line": line,
        }
        traces.append(_trace(folder, index, "control", **more))
    return traces


def _layout(folders: Sequence[Folder], scale: EpsFormat) -> dict[str, Any]:
    grid = sorted({point.eps for folder in folders for point in folder.result.universal})
    texts = [scale.text(eps) for eps in grid]
    # Short labels, so that they fit side by side on a phone.
    short = all(text.endswith("/255") for text in texts)
    highest = max(rate.high for folder in folders for rate in _points(folder)[1])
    top = next(top for top in _TOPS if 100 * highest <= top or top == _TOPS[-1])
    title = f"eps: {scale.meaning}<br>(pixels run from 0 to 1)"
    if short:
        title = f"eps, in 1/255 of the range of pixels:<br>{scale.meaning}"
    return {
        **plain_layout(480),
        "legend": {
            "orientation": "h",
            "y": -0.3,
            "yanchor": "top",
            "x": 0,
            "xanchor": "left",
        },
        "xaxis": {
            **AXIS,
            "title": {"text": title, "standoff": 10, "font": {"size": 13}},
            "range": [0, grid[-1] * 1.03 or 1],
            "tickvals": [0.0, *grid],
            "ticktext": ["0", *(text.removesuffix("/255") if short else text for text in texts)],
        },
        "yaxis": {
            **AXIS,
            "title": {"text": "UER: test images it gets wrong (%)", "standoff": 8, "font": {"size": 13}},
            "range": [0, 1.02 * top],
            "tickvals": [top * k / 5 for k in range(6)],
        },
    }


def _both(eps: float, scale: EpsFormat) -> str:
    return f"{scale.text(eps)} ({scale.decimal(eps)})" if scale.decimal(eps) else scale.text(eps)


def soft(colour: str, alpha: float = 0.16) -> str:
    """Return the colour with transparency."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
