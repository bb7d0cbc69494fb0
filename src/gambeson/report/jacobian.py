"""Charts of the Jacobian analysis: the loss along and across the gradient, and how alike images' Jacobians are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch

from gambeson.analysis import Spread
from gambeson.auditing.jacobian_results import JacobianResult, LossSurface, PairHistogram, Subspace
from gambeson.base import eps_text
from gambeson.report import pictures
from gambeson.report.charts import AXIS, LEGEND, MARKERS, Chart, embed, hue, plain_layout, soft
from gambeson.report.formatting import percent
from gambeson.report.loading import Folder
from gambeson.report.tables import NONE, Cell, Group, Line, Table

RAMP = ("#fdf6e3", "#f4c978", "#e0873c", "#a8412f", "#4d1a2e")
"""From low to high, with evenly decreasing lightness, so that it is readable in grey."""


_STEEP = 20
"""Ratio of the highest to the lowest loss from which their axis is logarithmic."""


def along(folders: Sequence[Folder], norm: str) -> Chart | None:
    """Draw the mean loss along the signed gradient and across it, for every model; a ridge is a decrease."""
    known = [
        (k, f, f.result.jacobian.surface)
        for k, f in enumerate(folders)
        if f.result.jacobian and f.result.jacobian.surface
    ]
    if not known:
        return None
    traces: list[dict[str, Any]] = []
    words = []
    for k, folder, surface in known:
        middle, name = len(surface.steps) // 2, escape(folder.label)
        gradient = [row[middle] for row in surface.loss]
        for way, y in {"along": gradient, "across": surface.loss[middle]}.items():
            solid = way == "along"
            traces.append(
                {"type": "scatter", "name": name, "legendgroup": str(k), "meta": way, "showlegend": solid}
                | {"x": surface.steps, "y": y, "mode": "lines+markers" if solid else "lines"}
                | {"line": {"color": hue(k), "width": 2.5 if solid else 1.4, "dash": "solid" if solid else "dot"}}
                | {"marker": {"symbol": MARKERS[k % len(MARKERS)], "size": 7}}
                | {"hovertemplate": f"{name}, {way}<br>step %{{x:.4g}}<br>loss %{{y:.4g}}<extra></extra>"}
            )
        words.append(f"{folder.label} from {gradient[middle]:.3g} at the image to {gradient[-1]:.3g} at the far end")
    layout = plain_layout(420)
    layout["xaxis"] |= _steps(known[0][2], norm, "step along the gradient's sign")
    losses = [loss for trace in traces for loss in trace["y"]]
    # On a linear axis the steepest model would press all others flat.
    steep = min(losses) > 0 and max(losses) > _STEEP * min(losses)
    title = "mean cross-entropy" + (" (logarithmic)" if steep else "")
    layout["yaxis"] |= {"title": {"text": title, "standoff": 8}, "type": "log" if steep else "linear"}
    layout["yaxis"] |= {"exponentformat": "power"}
    layout["legend"] = LEGEND
    alt = f"Loss along the signed gradient: {'; '.join(words)}."
    return Chart("along", embed({"data": traces, "layout": layout}), alt)


def surface(folder: Folder, index: int, norm: str) -> Chart | None:
    """Draw the mean loss over the grid, and the contour of an error of 50 %."""
    found = folder.result.jacobian.surface if folder.result.jacobian else None
    if found is None:
        return None
    # Rows are across the gradient, columns along it.
    loss, wrong = _turned(found.loss), _turned(found.wrong)
    text = [
        [f"loss {z:.3g}<br>wrong {100 * w:.0f} %" for z, w in zip(a, b, strict=True)]
        for a, b in zip(loss, wrong, strict=True)
    ]
    colours = [[k / (len(RAMP) - 1), colour] for k, colour in enumerate(RAMP)]
    place = {"x": found.steps, "y": found.steps}
    bar = {"thickness": 12, "len": 0.9, "title": {"text": "loss", "side": "top"}, "outlinewidth": 0}
    half = {"coloring": "none", "start": 0.5, "end": 0.5, "size": 1}
    traces = [
        {"type": "heatmap", "z": loss, "text": text, "hovertemplate": "%{text}<extra></extra>", **place}
        | {"colorscale": colours, "zsmooth": "best", "colorbar": bar},
        {"type": "contour", "z": wrong, "showscale": False, "hoverinfo": "skip", "contours": half, **place}
        | {"line": {"color": "#0072b2", "width": 2, "dash": "dash"}},
    ]
    layout = plain_layout(340)
    layout["xaxis"] |= _steps(found, norm, "along the gradient's sign")
    layout["yaxis"] |= _steps(found, norm, "across it")
    layout["margin"] = {"l": 52, "r": 8, "t": 10, "b": 48}
    low, high = min(map(min, found.loss)), max(map(max, found.loss))
    alt = f"Heat map of the mean loss of {folder.label} on {found.images} images: from {low:.3g} to {high:.3g}."
    return Chart(f"surface-{index}", embed({"data": traces, "layout": layout}), alt)


def singles(folder: Folder) -> list[str]:
    """Draw the loss around single images, each on its own scale, as PNG pictures."""
    found = folder.result.jacobian.surface if folder.result.jacobian else None
    return (
        [pictures.png(pictures.painted(torch.tensor(_turned(grid)).flip(0), RAMP)) for grid in found.singles]
        if found
        else []
    )


def pairs(folder: Folder, index: int) -> Chart | None:
    """Draw the distribution of cos_F within and between classes, as shares of the pairs of each kind."""
    known = folder.result.jacobian.pairs if folder.result.jacobian else []
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
        {"type": "bar", "name": name, "x": centres, "width": width, "marker": marker, "textposition": "none"}
        | {"y": [100 * count / max(1, sum(counts)) for count in counts], "text": [str(count) for count in counts]}
        | {"hovertemplate": f"{name}<br>cos_F about %{{x:.3g}}<br>%{{y:.1f}} % of pairs (%{{text}})<extra></extra>"}
        for name, counts, marker in kinds
    ]
    layout = plain_layout(300)
    layout |= {"barmode": "overlay", "bargap": 0}
    layout["xaxis"] |= {"title": {"text": "cos_F of two images' Jacobians", "standoff": 8}, "range": _shown(found)}
    layout["yaxis"] |= {"title": {"text": "share of pairs (%)", "standoff": 8}, "rangemode": "tozero"}
    layout["legend"] = LEGEND | {"y": 1.02, "yanchor": "bottom", "title": {"text": "pairs of ", "font": {"size": 13}}}
    ends = [
        f"{spread.median:.3g} for pairs of {name}"
        for name, spread in (("one class", found.within), ("two classes", found.between))
        if spread
    ]
    alt = f"Histogram of cos_F for {folder.label}: median {', '.join(ends)}."
    return Chart(f"pairs-{index}", embed({"data": traces, "layout": layout}), alt)


def _shown(found: PairHistogram) -> list[float]:
    full = [k for k, pair in enumerate(zip(found.within_counts, found.between_counts, strict=True)) if any(pair)]
    if not full:
        return [found.edges[0], found.edges[-1]]
    return [min(-0.25, found.edges[full[0]]), 1.0]


def _steps(found: LossSurface, norm: str, title: str) -> dict[str, Any]:
    end = found.steps[-1]
    text = eps_text(end) if norm == "inf" else f"{end:.3g}"
    return {
        "title": {"text": title, "standoff": 8},
        "tickvals": [-end, 0, end],
        "ticktext": [f"-{text}", "0", text],
        "zeroline": False,
        **{key: AXIS[key] for key in ("linecolor", "ticks")},
    }


def _turned(grid: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*grid, strict=True)]


def build(folders: Sequence[Folder], norm: str) -> list[Table]:
    """Build the non-empty tables."""
    found = [_norms(folders), _pairs(folders), _bounds(folders), _subspaces(folders, norm)]
    return [table for table in found if any(group.lines for group in table.groups)]


def _norms(folders: Sequence[Folder]) -> Table:
    def line(name: str, note: str, cell: Callable[[JacobianResult], Cell]) -> Line:
        results = [folder.result.jacobian for folder in folders]
        return Line(name, note, [cell(found) if found else NONE for found in results])

    def norm(field: str) -> Callable[[JacobianResult], Cell]:
        return lambda s: _spread(getattr(s.norms, field) if s.norms else None)

    def share(field: str) -> Callable[[JacobianResult], Cell]:
        def cell(found: JacobianResult) -> Cell:
            if (known := found.gradients) is None:
                return NONE
            return Cell(percent(getattr(known, field)), (f"n = {known.images:,}",))

        return cell

    one_direction = "1: one worst direction for all; 1/n: none in common"
    rows = [
        line("Jacobian, Frobenius norm", "logits per pixel unit", _frobenius),
        line("Jacobian, spectral norm", "logits per pixel unit", norm("spectral")),
        line("reach", "no shorter pattern (L2) flips the linearised model", norm("reach")),
        line("loss gradient, L2 length", "rise of the loss per pixel unit", _loss_norm),
        line("loss gradient exactly zero", "share of images", share("loss_zero")),
        line("probability saturated at 1", "share of images", share("saturated")),
        line("sharing factor", one_direction, _sharing),
        line("gradient sharing", "1: one gradient for all images", _gradient_sharing),
        line("ridge", "how much of the loss's rise is lost at the far end", _ridge),
    ]
    lines = [row for row in rows if any(cell != NONE for cell in row.cells)]
    note = "Medians over images, with the range of the middle 90 % below; these ranges are not confidence intervals."
    return Table("Jacobian at a glance", ["Measure", *(f.label for f in folders)], [Group(None, lines)], note)


def _loss_norm(found: JacobianResult) -> Cell:
    return _spread(found.gradients.loss_norm if found.gradients else None)


def _ridge(found: JacobianResult) -> Cell:
    return _spread(found.surface.ridge if found.surface else None)


def _sharing(found: JacobianResult) -> Cell:
    if found.sharing is None or not found.bounds:
        return NONE
    return Cell(f"{found.sharing:.3f}", (f"n = {found.bounds.table.images:,}",))


def _frobenius(found: JacobianResult) -> Cell:
    if found.norms is None:
        return _spread(found.frobenius, "estimated")
    return _spread(found.norms.frobenius)


def _gradient_sharing(found: JacobianResult) -> Cell:
    sharing = found.gradient_sharing
    if sharing is None or sharing.ratio is None:
        return NONE
    return Cell(f"{sharing.ratio:.3f}", (f"n = {found.images:,}",))


def _spread(found: Spread | None, *more: str) -> Cell:
    if found is None:
        return NONE
    return Cell(f"{found.median:.3g}", (f"{found.low:.3g} to {found.high:.3g}", f"n = {found.n:,}", *more))


def _pairs(folders: Sequence[Folder]) -> Table:
    columns = [{p.metric: p for p in f.result.jacobian.pairs} if f.result.jacobian else {} for f in folders]
    meaning = {
        "cos_F": "cosine of the two",
        "ratio_s": "how much of both one direction reaches, from 1/2",
        "rank1": "share of both that one direction holds",
        "cka": "alignment of the spaces they span",
    }
    lines = []
    for metric in dict.fromkeys(metric for column in columns for metric in column):
        found = [column.get(metric) for column in columns]
        lines.append(Line(metric, meaning.get(metric, ""), [_pair(p) for p in found]))
    note = (
        "Left of the stroke: pairs of one class; right of it: pairs of two classes. Medians, and the middle 90 % below."
    )
    head = ["Metric", *(f.label for f in folders)]
    return Table("How alike the Jacobians of two images are", head, [Group(None, lines)], note)


def _pair(found: PairHistogram | None) -> Cell:
    if found is None:
        return NONE
    sides = [
        (side, sum(counts))
        for side, counts in ((found.within, found.within_counts), (found.between, found.between_counts))
    ]
    main = " / ".join(f"{side.median:.2f}" if side else NONE.main for side, _ in sides)
    return Cell(main, (*(f"{side.low:.2f} to {side.high:.2f}, n = {n:,}" for side, n in sides if side),))


def _bounds(folders: Sequence[Folder]) -> Table:
    groups, counts = [], []
    for k, folder in enumerate(folders):
        found = folder.result.jacobian
        if found is None or found.bounds is None:
            continue
        lines = []
        table = found.bounds.table
        for eps, row in zip(found.bounds.eps, table.rows, strict=True):
            errors = (row.measured_error, row.linear_error, row.counted_error, row.effect_error, row.bound_error)
            cells = [Cell(percent(error)) for error in errors]
            lines.append(Line(f"eps {eps_text(eps)}", "", [*cells, Cell(percent(row.attained))]))
        groups.append(Group(k, lines))
        counts.append(f"{folder.label} {table.images:,}")
    head = [
        "Pattern",
        "UER\nmeasured",
        "UER\nlinearised model",
        "Bound\nby each image's margin",
        "Bound\nby the effect",
        "Bound\nby the spectrum",
        "Effect\nof the largest possible",
    ]
    note = (
        "Each bound is at least the one to its left, from the linearised model on: it holds for the linearised model, "
    )
    note += (
        "and the measured rate may differ from that. The last column is the crafted pattern's effect on the logits as "
    )
    note += "a share of what the best L2 pattern of its length does."
    note += f" Images: {', '.join(counts)}."
    return Table("Bounds against measured UER, on the sample", head, groups, note)


def _subspaces(folders: Sequence[Folder], norm: str) -> Table:
    columns = [{s.norm: s for s in f.result.jacobian.subspaces} if f.result.jacobian else {} for f in folders]
    lines = []
    for norm in dict.fromkeys(norm for column in columns for norm in column):
        found = [column.get(norm) for column in columns]
        first = next(s for s in found if s)
        size = eps_text(first.eps) if norm == norm else f"{first.eps:.3g}"
        orders = " / ".join(str(k) for k in first.orders)
        lines.append(Line(f"norm {norm}, eps {size}", f"at least {orders} directions", [_subspace(s) for s in found]))
    note = "Share of the images, right when clean, of which at least so many mutually orthogonal directions of this "
    note += "length break the model (GAAS). A larger subspace means that perturbations transfer more easily."
    head = ["Directions", *(f.label for f in folders)]
    return Table("Dimension of the adversarial subspace", head, [Group(None, lines)], note)


def _subspace(found: Subspace | None) -> Cell:
    if found is None or not found.eligible:
        return NONE
    main = " / ".join(f"{100 * share:.0f}" for share in found.shares) + " %"
    dead = (f"{found.dead} more without a gradient",) if found.dead else ()
    return Cell(main, (f"n = {found.eligible:,}", *dead))
