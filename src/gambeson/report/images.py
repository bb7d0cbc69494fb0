"""Images: tensors as PNG pictures inside the page, and heat maps of transfer tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gambeson.base import pixel_bytes, write_text
from gambeson.evaluation.transfer import TransferResult, TransferTable


def png(pixels: torch.Tensor) -> str:
    """Return a PNG data URI of a uint8 image (C, H, W); of other than 1 or 3 channels, the first."""
    if len(pixels) == 3:
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")
    else:
        picture = Image.fromarray(pixels[0].contiguous().numpy(), "L")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def reach(delta: torch.Tensor, eps: float, norm: str) -> float:
    """Return the change drawn as white: eps, or the largest change if eps is a Euclidean length."""
    return eps if norm == "inf" else float(delta.abs().max())


def signed(delta: torch.Tensor, white: float) -> torch.Tensor:
    """Return delta (C, H, W) as uint8 pixels: grey is no change, 255 is +white, 0 is -white, each channel."""
    return pixel_bytes(torch.full_like(delta, 0.5) if white == 0 else 0.5 + delta.float() / (2 * white))


def painted(values: torch.Tensor, ramp: Sequence[str]) -> torch.Tensor:
    """Return values (H, W) as uint8 pixels (3, H, W): the lowest in the ramp's first colour, the highest its last."""
    low, high = float(values.min()), float(values.max())
    place = (values.double() - low) / max(high - low, 1e-300) * (len(ramp) - 1)
    colours = torch.tensor([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in ramp], dtype=torch.float64)
    below = place.floor().long().clamp(max=len(ramp) - 2)
    share = (place - below)[..., None]
    return pixel_bytes((colours[below] * (1 - share) + colours[below + 1] * share).permute(2, 0, 1) / 255)


def icon() -> str:
    """Return the page's icon, a small chessboard."""
    rows, columns = torch.arange(16).view(-1, 1) // 4, torch.arange(16) // 4
    return png(((rows + columns) % 2 * 150 + 70).to(torch.uint8)[None])


def write_heat_map(result: TransferResult, path: Path) -> Path:
    """Write a page with one heat map per attack: sources are rows, targets columns, errors in per cent."""
    from plotly.subplots import make_subplots

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
