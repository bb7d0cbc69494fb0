"""Charts of a model's slopes: the loss along and across the gradient, and how alike images' Jacobians are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from gambeson.auditing.slope_results import LossSurface, PairHistogram
from gambeson.report import pictures
from gambeson.report.charts import AXIS, MARKERS, Chart, embed, hue, plain_layout, soft
from gambeson.report.folders import Folder
from gambeson.report.words import Scale

RAMP = ("#fdf6e3", "#f4c978", "#e0873c", "#a8412f", "#4d1a2e")
"""From low to high; its lightness falls evenly, so that it reads in grey as well."""


def along(folders: Sequence[Folder], scale: Scale) -> Chart | None:
    """Draw the mean loss along the signed gradient, and across it, for every model: a ridge shows as a fall."""
    known = [
        (k, f, f.result.slopes.surface) for k, f in enumerate(folders) if f.result.slopes and f.result.slopes.surface
    ]
    if not known:
        return None
    traces, words = [], []
    for k, folder, surface in known:
        middle = len(surface.steps) // 2
        gradient = [row[middle] for row in surface.loss]
        lines = {"along": gradient, "across": surface.loss[middle]}
        for way, y in lines.items():
            traces.append(
                {
                    "type": "scatter",
                    "name": escape(folder.label),
                    "legendgroup": str(k),
                    "meta": way,
                    "showlegend": way == "along",
                    "x": surface.steps,
                    "y": y,
                    "mode": "lines+markers" if way == "along" else "lines",
                    "line": {
                        "color": hue(k),
                        "width": 2.5 if way == "along" else 1.4,
                        "dash": "solid" if way == "along" else "dot",
                    },
                    "marker": {"symbol": MARKERS[k % len(MARKERS)], "size": 7},
                    "hovertemplate": f"{escape(folder.label)}, {way}<br>step %{{x:.4g}}<br>"
                    "loss %{y:.4g}<extra></extra>",
                }
            )
        words.append(f"{folder.label} from {gradient[middle]:.3g} at the image to {gradient[-1]:.3g} at the far end")
    layout = plain_layout(420)
    layout["xaxis"] |= _steps(known[0][2], scale, "step along the gradient's sign")
    layout["yaxis"] |= {"title": {"text": "mean cross-entropy", "standoff": 8}, "rangemode": "tozero"}
    layout["legend"] = {"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0, "xanchor": "left"}
    return Chart(
        "along", embed({"data": traces, "layout": layout}), f"Loss along the signed gradient: {'; '.join(words)}."
    )


def surface(folder: Folder, index: int, scale: Scale) -> Chart | None:
    """Draw the mean loss over the grid, and the border beyond which the model gets half of the images wrong."""
    found = folder.result.slopes.surface if folder.result.slopes else None
    if found is None:
        return None
    # Rows are what runs upwards: across the gradient; columns run along it.
    loss, wrong = _turned(found.loss), _turned(found.wrong)
    text = [
        [f"loss {z:.3g}<br>wrong {100 * w:.0f} %" for z, w in zip(a, b, strict=True)]
        for a, b in zip(loss, wrong, strict=True)
    ]
    colours = [[k / (len(RAMP) - 1), colour] for k, colour in enumerate(RAMP)]
    traces = [
        {
            "type": "heatmap",
            "x": found.steps,
            "y": found.steps,
            "z": loss,
            "text": text,
            "hovertemplate": "%{text}<extra></extra>",
            "colorscale": colours,
            "zsmooth": "best",
            "colorbar": {"thickness": 12, "len": 0.9, "title": {"text": "loss", "side": "top"}, "outlinewidth": 0},
        },
        {
            "type": "contour",
            "x": found.steps,
            "y": found.steps,
            "z": wrong,
            "showscale": False,
            "hoverinfo": "skip",
            "contours": {"coloring": "none", "start": 0.5, "end": 0.5, "size": 1},
            "line": {"color": "#0072b2", "width": 2, "dash": "dash"},
        },
    ]
    layout = plain_layout(340)
    layout["xaxis"] |= _steps(found, scale, "along the gradient's sign")
    layout["yaxis"] |= _steps(found, scale, "across it")
    layout["margin"] = {"l": 52, "r": 8, "t": 10, "b": 48}
    low, high = min(map(min, found.loss)), max(map(max, found.loss))
    alt = f"Heat map of the mean loss of {folder.label} on {found.images} images: from {low:.3g} to {high:.3g}."
    return Chart(f"surface-{index}", embed({"data": traces, "layout": layout}), alt)


def singles(folder: Folder) -> list[str]:
    """Paint the loss around single images, each on its own scale, as PNG pictures."""
    found = folder.result.slopes.surface if folder.result.slopes else None
    return (
        [pictures.png(pictures.painted(torch.tensor(_turned(grid)).flip(0), RAMP)) for grid in found.singles]
        if found
        else []
    )


def pairs(folder: Folder, index: int) -> Chart | None:
    """Draw the distribution of cos_F within and between classes, as shares of the pairs of each kind."""
    known = folder.result.slopes.pairs if folder.result.slopes else []
    found = next((pair for pair in known if pair.metric == "cos_F"), None)
    if found is None:
        return None
    centres = [(low + high) / 2 for low, high in zip(found.edges, found.edges[1:], strict=False)]
    width = found.edges[1] - found.edges[0]
    colour = hue(index)
    kinds = [
        ("two classes", found.between_counts, {"color": "#c9d0d8", "line": {"color": "#8b95a3", "width": 1}}),
        ("one class", found.within_counts, {"color": soft(colour, 0.45), "line": {"color": colour, "width": 1}}),
    ]
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": centres,
            "y": [100 * count / max(1, sum(counts)) for count in counts],
            "text": [str(count) for count in counts],
            "textposition": "none",
            "width": width,
            "marker": marker,
            "hovertemplate": f"{name}<br>cos_F about %{{x:.3g}}<br>%{{y:.1f}} % of pairs (%{{text}})<extra></extra>",
        }
        for name, counts, marker in kinds
    ]
    layout = plain_layout(300)
    layout |= {"barmode": "overlay", "bargap": 0}
    layout["xaxis"] |= {"title": {"text": "cos_F of two images' Jacobians", "standoff": 8}, "range": _shown(found)}
    layout["yaxis"] |= {"title": {"text": "share of pairs (%)", "standoff": 8}, "rangemode": "tozero"}
    layout["legend"] = {
        "orientation": "h",
        "y": 1.02,
        "yanchor": "bottom",
        "x": 0,
        "xanchor": "left",
        "title": {"text": "pairs of ", "font": {"size": 13}},
    }
    ends = [
        f"{spread.median:.3g} for pairs of {name}"
        for name, spread in (("one class", found.within), ("two classes", found.between))
        if spread
    ]
    return Chart(
        f"pairs-{index}",
        embed({"data": traces, "layout": layout}),
        f"Histogram of cos_F for {folder.label}: median {', '.join(ends)}.",
    )


def _shown(found: PairHistogram) -> list[float]:
    full = [k for k, pair in enumerate(zip(found.within_counts, found.between_counts, strict=True)) if any(pair)]
    if not full:
        return [found.edges[0], found.edges[-1]]
    return [min(-0.25, found.edges[full[0]]), 1.0]


def _steps(found: LossSurface, scale: Scale, title: str) -> dict[str, Any]:
    end = found.steps[-1]
    text = scale.text(end) if scale.norm == "inf" else f"{end:.3g}"
    return {
        "title": {"text": title, "standoff": 8},
        "tickvals": [-end, 0, end],
        "ticktext": [f"-{text}", "0", text],
        "zeroline": False,
        **{key: AXIS[key] for key in ("linecolor", "ticks")},
    }


def _turned(grid: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*grid, strict=True)]
