"""Heat maps of transfer tables, as one self-contained page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from gambeson.base import write_text
from gambeson.evaluation.transfer import TransferResult, TransferTable


def write_heat_map(result: TransferResult, path: Path) -> Path:
    """Write a page with one heat map an attack: sources down, targets across, errors in per cent with intervals."""
    from plotly.subplots import make_subplots  # imported where it is used: attacking and training run without it

    count = len(result.tables)
    figure = make_subplots(rows=count, cols=1, subplot_titles=[escape(table.attack) for table in result.tables])
    labels = [escape(label) for label in result.labels]
    for row, table in enumerate(result.tables, 1):
        figure.add_trace(_map(table, labels), row=row, col=1)
    figure.update_yaxes(autorange="reversed", title="source")
    figure.update_xaxes(title="target")
    figure.update_layout(
        title=f"Error under transferred examples, eps {result.run.eps:.4g} ({result.run.norm})",
        height=220 + count * (160 + 40 * len(labels)),
        template="plotly_white",
    )
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path


def _map(table: TransferTable, labels: list[str]) -> Any:
    import plotly.graph_objects as go

    values = [[None if rate is None else 100 * rate.value for rate in row] for row in table.errors]
    words = [["" if rate is None else str(rate) for rate in row] for row in table.errors]
    return go.Heatmap(
        z=values,
        x=labels,
        y=labels,
        text=words,
        texttemplate="%{text}",
        zmin=0,
        zmax=100,
        colorscale="Oranges",
        coloraxis=None,
        showscale=False,
        hovertemplate="from %{y} to %{x}: %{text}<extra></extra>",
    )
