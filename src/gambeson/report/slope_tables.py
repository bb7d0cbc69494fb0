"""Tables of a model's slopes: norms, what images share of them, bounds against what was measured, subspaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gambeson.analysis import Spread
from gambeson.auditing.slope_results import PairHistogram, Slopes, Subspace
from gambeson.report.folders import Folder
from gambeson.report.tables import NONE, Cell, Group, Line, Table
from gambeson.report.words import Scale, percent


def build(folders: Sequence[Folder], scale: Scale) -> list[Table]:
    """Build the tables that have anything in them."""
    found = [_norms(folders), _pairs(folders), _bounds(folders, scale), _subspaces(folders, scale)]
    return [table for table in found if any(group.lines for group in table.groups)]


def _norms(folders: Sequence[Folder]) -> Table:
    def line(name: str, note: str, cell: Callable[[Slopes], Cell]) -> Line:
        slopes = [folder.result.slopes for folder in folders]
        return Line(name, note, [cell(found) if found else NONE for found in slopes])

    rows = [
        line("Jacobian, Frobenius norm", "logits per pixel unit", lambda s: _frobenius(s)),
        line(
            "Jacobian, spectral norm", "logits per pixel unit", lambda s: _spread(s.norms.spectral if s.norms else None)
        ),
        line(
            "reach",
            "no shorter pattern (L2) flips the linearised model",
            lambda s: _spread(s.norms.reach if s.norms else None),
        ),
        line(
            "loss gradient, L2 length",
            "rise of the loss per pixel unit",
            lambda s: _spread(s.gradients.loss_norm if s.gradients else None),
        ),
        line(
            "loss gradient exactly zero",
            "share of images",
            lambda s: Cell(percent(s.gradients.loss_zero), (f"n = {s.gradients.images:,}",)) if s.gradients else NONE,
        ),
        line(
            "probability saturated at 1",
            "share of images",
            lambda s: Cell(percent(s.gradients.saturated), (f"n = {s.gradients.images:,}",)) if s.gradients else NONE,
        ),
        line(
            "sharing factor",
            "1: one worst direction for all; 1/n: none in common",
            lambda s: (
                NONE
                if s.sharing is None or not s.bounds
                else Cell(f"{s.sharing:.3f}", (f"n = {s.bounds.table.images:,}",))
            ),
        ),
        line("gradient sharing", "1: one gradient for all images", _gradient_sharing),
        line(
            "ridge",
            "how much of the loss's rise is lost at the far end",
            lambda s: _spread(s.surface.ridge if s.surface else None),
        ),
    ]
    lines = [row for row in rows if any(cell != NONE for cell in row.cells)]
    note = "Medians over images, with the range of the middle 90 % below; these ranges are not confidence intervals."
    return Table("Slopes at a glance", ["Measure", *(f.label for f in folders)], [Group(None, lines)], note)


def _frobenius(slopes: Slopes) -> Cell:
    if slopes.norms is None:
        return _spread(slopes.frobenius, "estimated")
    return _spread(slopes.norms.frobenius)


def _gradient_sharing(slopes: Slopes) -> Cell:
    found = slopes.gradient_sharing
    if found is None or found.ratio is None:
        return NONE
    return Cell(f"{found.ratio:.3f}", (f"n = {slopes.images:,}",))


def _spread(found: Spread | None, *more: str) -> Cell:
    if found is None:
        return NONE
    return Cell(f"{found.median:.3g}", (f"{found.low:.3g} to {found.high:.3g}", f"n = {found.n:,}", *more))


def _pairs(folders: Sequence[Folder]) -> Table:
    columns = [{p.metric: p for p in f.result.slopes.pairs} if f.result.slopes else {} for f in folders]
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


def _bounds(folders: Sequence[Folder], scale: Scale) -> Table:
    groups, counts = [], []
    for k, folder in enumerate(folders):
        slopes = folder.result.slopes
        if slopes is None or slopes.bounds is None:
            continue
        lines = []
        table = slopes.bounds.table
        for eps, row in zip(slopes.bounds.eps, table.rows, strict=True):
            errors = (row.measured_error, row.linear_error, row.counted_error, row.effect_error, row.bound_error)
            cells = [Cell(percent(error)) for error in errors]
            lines.append(Line(f"eps {scale.text(eps)}", "", [*cells, Cell(percent(row.attained))]))
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


def _subspaces(folders: Sequence[Folder], scale: Scale) -> Table:
    columns = [{s.norm: s for s in f.result.slopes.subspaces} if f.result.slopes else {} for f in folders]
    lines = []
    for norm in dict.fromkeys(norm for column in columns for norm in column):
        found = [column.get(norm) for column in columns]
        first = next(s for s in found if s)
        size = scale.text(first.eps) if norm == scale.norm else f"{first.eps:.3g}"
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
