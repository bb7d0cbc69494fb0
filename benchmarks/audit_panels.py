"""Pictures with two panels, a model that fails a diagnostic beside one that passes: how :mod:`audit_pictures` draws.

A panel is plain data: ``{"kind": "bars" | "lines" | "points" | "columns", "x": label, "y": label, ...}``; both panels
of a picture have the same kind and get the same axes. Matplotlib is needed (the extra ``quickstart`` brings it).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gambeson.evaluation import Rate

Panel = dict[str, Any]
PERCENT: Panel = {"y": "accuracy, %", "range": [0, 105]}

HUES = ("#0072B2", "#D55E00")
"""Blue and vermilion (Okabe and Ito): told apart by every kind of colour vision, and by their lightness in print."""
_INK, _PALE = "#333333", "#8a8a8a"


def rate_of(rate: Rate) -> dict[str, float]:
    """Return a rate and the ends of its interval in per cent."""
    return {"value": 100 * rate.value, "low": 100 * rate.low, "high": 100 * rate.high}


def line_of(name: str, xs: Sequence[float], rates: Sequence[Rate], **style: Any) -> dict[str, Any]:
    """Return a line of rates with their intervals."""
    parts = [rate_of(rate) for rate in rates]
    ends = {"y": "value", "low": "low", "high": "high"}
    return {"name": name, "x": list(xs), **{key: [part[end] for part in parts] for key, end in ends.items()}, **style}


def draw(panels: dict[str, Panel], path: Path) -> None:
    """Draw ``fails`` and ``votes`` side by side, 640 x 260 pixels at twice the density, as a PNG of 64 colours.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("matplotlib is missing: pip install 'gambeson[quickstart]', which brings it") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": _PALE,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), dpi=200, sharex=True, sharey=True, layout="constrained")
        for ax, word in zip(axes, ("fails", "passes"), strict=True):
            _KINDS[panels[word]["kind"]](ax, panels[word])
            _limit(ax, panels[word])
            ax.set_title(word, loc="left", fontsize=10, fontweight="bold", color=_INK)
        first = panels["fails"]
        axes[0].set_ylabel(first.get("y", ""))
        if first.get("x"):
            figure.supxlabel(first["x"], fontsize=9)
        if "range" in first:
            axes[0].set_ylim(*first["range"])
        if first.get("log"):
            axes[0].set_xscale("log")
            axes[0].set_xticks(first["ticks"], [f"{tick:g}" for tick in first["ticks"]])
            axes[0].minorticks_off()
        _legend(axes, first)
        page = io.BytesIO()
        figure.savefig(page, format="png")
        plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(page).convert("RGB").quantize(64).save(path, optimize=True)


def _bars(ax: Any, panel: Panel) -> None:
    for place, bar in enumerate(panel["bars"]):
        spread = [[max(0.0, bar["value"] - bar["low"])], [max(0.0, bar["high"] - bar["value"])]]
        hue = HUES[bar.get("hue", min(place, 1))]
        ax.bar(place, bar["value"], 0.6, color=hue, yerr=spread, error_kw={"ecolor": _INK, "capsize": 4, "lw": 1.2})
        ax.annotate(
            f"{bar['value']:.0f}",
            (place + 0.06, bar["high"]),
            (0, 2),
            textcoords="offset points",
            size=8.5,
            zorder=6,
            path_effects=_halo(),
        )
    ax.set_xticks(range(len(panel["bars"])), [bar["name"] for bar in panel["bars"]])
    ax.set_xlim(-0.6, len(panel["bars"]) - 0.4)


def _lines(ax: Any, panel: Panel) -> None:
    for place, line in enumerate(panel["lines"]):
        hue = HUES[line.get("hue", min(place, 1))]
        style = "" if line.get("apart") else "-"
        mark = "" if line.get("plain") else "os"[place % 2]
        ax.plot(
            line["x"], line["y"], style + mark, color=hue, label=line["name"], ms=4, lw=1.6, clip_on=False, zorder=3
        )
        if "low" in line:
            ax.fill_between(line["x"], line["low"], line["high"], color=hue, alpha=0.18, lw=0)
    for place in panel.get("marks", ()):
        ax.axvline(place["x"], color=_PALE, lw=1, ls=":")
        ax.annotate(
            place["name"],
            (place["x"], 1),
            (3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            size=8,
            color=_INK,
        )


def _points(ax: Any, panel: Panel) -> None:
    low, high = panel["frame"]
    if "band" in panel:
        ends = [low, high]
        for factor in panel["band"]:
            ax.plot(ends, [factor * end for end in ends], color=_PALE, lw=1, ls="--")
    for place, group in enumerate(panel["points"]):
        ax.scatter(group["x"], group["y"], s=10, color=HUES[group.get("hue", place)], alpha=0.75, lw=0, zorder=3)
    ax.set_xlim(low, high)
    ax.set_ylim(*panel.get("height", (low, high)))


def _columns(ax: Any, panel: Panel) -> None:
    for place, count in enumerate(panel["counts"]):
        ax.bar(place, count, 0.85, color=HUES[1 if place < panel["dead"] else 0])
        if count:
            ax.annotate(f"{count:.0f}", (place, count), (0, 1), textcoords="offset points", ha="center", size=8)
    ax.set_xticks(range(len(panel["names"])), panel["names"])


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


_KINDS = {"bars": _bars, "lines": _lines, "points": _points, "columns": _columns}


def _limit(ax: Any, panel: Panel) -> None:
    if panel.get("limit") is None or panel["limit"] < 0:
        return
    ax.axhline(panel["limit"], color=_INK, lw=1.1, ls="--", zorder=4)
    place = panel.get("limit_at", (0.99, "right"))
    ax.annotate(
        panel.get("limit_says", "limit"),
        (place[0], panel["limit"]),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha=place[1],
        va="bottom",
        size=8,
        zorder=6,
        path_effects=_halo(),
    )


def _legend(axes: Any, panel: Panel) -> None:
    if panel["kind"] == "lines" and len(panel["lines"]) > 1:
        axes[1].legend(loc=panel.get("legend", "best"))
