"""What results show in notebooks: tables as text and HTML, data frames, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gambeson.base.extras import required


def text_table(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and one aligned line per row."""
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """Return the same as an HTML table."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption style='text-align:left'>{escape(title)}</caption>{cells}</table>"


class ShownAsTable:
    """A result that a terminal and a notebook show as a table."""

    def _lines(self) -> tuple[str, Mapping[str, str]]:
        """Return a title, and each row's name and text."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return text_table(*self._lines())

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table(*self._lines())


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a ``pandas.DataFrame`` with one line per row.

    Raises:
        UserError: pandas is not installed.
    """
    return required("pandas", "to_frame").DataFrame(list(rows))


def curves(lines: Mapping[str, tuple[Sequence[float | str], Sequence[Any]]], title: str, x: str, y: str) -> Any:
    """Return a ``plotly`` figure of rates with their intervals.

    Args:
        lines: by name, the values of x and the rates.
        title: of the figure.
        x: title of the axis.
        y: likewise; in per cent.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (places, rates) in lines.items():
        shares = [100 * rate.value for rate in rates]
        bars = {
            "array": [100 * rate.high - share for rate, share in zip(rates, shares, strict=True)],
            "arrayminus": [share - 100 * rate.low for rate, share in zip(rates, shares, strict=True)],
        }
        figure.add_scatter(x=list(places), y=shares, error_y=bars, name=name, mode="lines+markers")
    figure.update_layout(title=title, template="plotly_white", xaxis_title=x, yaxis={"title": y, "range": [0, 100]})
    return figure


def heat_maps(maps: Mapping[str, Sequence[Sequence[Any]]], labels: Sequence[str], title: str) -> Any:
    """Return a ``plotly`` figure with one heat map of rates (None: unknown) per name; rows are sources."""
    from plotly.subplots import make_subplots

    labels = [escape(label) for label in labels]
    figure = make_subplots(rows=len(maps), cols=1, subplot_titles=[escape(name) for name in maps])
    for row, rates in enumerate(maps.values(), 1):
        figure.add_heatmap(
            z=[[None if rate is None else 100 * rate.value for rate in line] for line in rates],
            text=[["" if rate is None else str(rate) for rate in line] for line in rates],
            x=labels,
            y=labels,
            texttemplate="%{text}",
            zmin=0,
            zmax=100,
            colorscale="Oranges",
            showscale=False,
            hovertemplate="from %{y} to %{x}: %{text}<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_yaxes(autorange="reversed", title="source")
    figure.update_xaxes(title="target")
    figure.update_layout(title=title, template="plotly_white", height=220 + len(maps) * (160 + 40 * len(labels)))
    return figure


def picture(delta: Any, title: str) -> Any:
    """Return a ``plotly`` figure of a pattern (C, H, W): from its least to its largest value of any channel."""
    import plotly.express as px

    low, high = float(delta.min()), float(delta.max())
    pixels = ((delta - low) / max(high - low, 1e-12)).permute(1, 2, 0).numpy()
    grey = pixels.shape[2] != 3
    figure = px.imshow(
        pixels.mean(2) if grey else pixels, title=title, **({"color_continuous_scale": "gray"} if grey else {})
    )
    figure.update_layout(coloraxis_showscale=False)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
