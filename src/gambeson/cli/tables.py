"""Result tables for the terminal: 80 columns for three models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from gambeson.auditing import AuditPlan, AuditResult
    from gambeson.evaluation import EditsResult, PlacementResult, Rate
    from gambeson.evaluation.rates import Control, SmallestEps

    Cells = Callable[[AuditResult], str]

_NONE = "\N{EN DASH}"


def audit_table(results: Sequence[AuditResult]) -> Table:
    """One column per model: the verdict, accuracy clean and attacked, UER beside its strongest control, and eps_uni."""
    from gambeson.base import eps_text

    first, noises = results[0], [one.size for result in results for one in result.corruption]
    sizes = f" (eps to {max(noises):.3g})" if noises else ""
    table = Table(
        title=f"{first.material.test} test images of {first.material.name}: "
        f"per cent{'' if first.material.unit == 'image' else f' of {first.material.unit}s'} [95 % interval]",
        box=box.SIMPLE_HEAD,
        min_width=60,
        caption=f"per image, transfer, noise{sizes}: the worst, its interval widened; UER: error under one pattern for "
        "all",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.subject.label, justify="right", no_wrap=len(results) < 4)

    def row(name: str, cell: Cells, style: str | None = None) -> None:
        table.add_row(name, *[cell(result) for result in results], style=style)

    row("numbers", _trust, "bold")
    row("checks failed", _failed)
    table.add_section()
    row("accuracy, clean", lambda result: _cell(result.clean))
    row("  per image", _worst)
    if any(result.iou is not None for result in results):
        row("mean IoU, clean", lambda result: _NONE if result.iou is None else _cell(result.iou.mean))
    row("error, transfer", _transferred)
    row("error, noise", _noise)
    table.add_section()
    for eps in sorted({point.eps for result in results for point in result.universal}):
        row(f"UER, eps {eps_text(eps)}", _uer(eps), "bold")
        row("  strongest control", _control(eps), "dim")
        if any(point.iou is not None for result in results for point in result.universal):
            row("  mean IoU", _iou(eps))
    deltas = {result.eps_uni.delta for result in results}
    delta = f"({deltas.pop():g})" if len(deltas) == 1 else ""
    row(f"eps_uni{delta}", lambda result: _smallest(result.eps_uni))
    if any(result.eps_adv is not None for result in results):
        row(f"eps_adv{delta}", lambda result: _NONE if result.eps_adv is None else _smallest(result.eps_adv), "dim")
    return table


def plan_table(cost: AuditPlan) -> Table:
    """One row per part of the audit: how many forwards and gradients, and how long at the most."""
    from gambeson.base import duration

    first = f"{cost.surrogate} is trained first; " if cost.surrogate else ""
    extra = duration(cost.seconds_of(cost.adaptive))
    table = Table(
        title=f"about {duration(cost.seconds)} at the most, on {cost.speed.device}",
        box=box.SIMPLE_HEAD,
        caption=f"{first}where the gradient turns out to be false, attacks without it come on top: {extra} at the most",
    )
    for name in ("", "forwards", "gradients", "at most"):
        table.add_column(name, justify="right" if name else "left")
    for part in cost.parts:
        if cost.seconds_of(part) == 0:  # not in the suite
            continue
        table.add_row(part.name, f"{part.forwards:,}", f"{part.gradients:,}", duration(cost.seconds_of(part)))
    return table


def _trust(result: AuditResult) -> str:
    from gambeson.auditing.display import trust_in

    return trust_in(result).partition(":")[0]


def edits_table(found: EditsResult) -> Table:
    """One row per edit: errors under the perturbation, on clean images and under the strongest control."""
    from gambeson.base import eps_text

    table = Table(
        title=f"edited images, eps {eps_text(found.eps)}: per cent [95 % interval]",
        box=box.SIMPLE_HEAD,
        caption=_patterns(found.rates[0].controls),
    )
    for name in ("edit", "UER", "clean error", "strongest control"):
        table.add_column(name, justify="left" if name == "edit" else "right")
    for one in found.rates:
        table.add_row(one.edit, *map(_cell, (one.uer, one.clean, one.control)))
    return table


def places_table(found: PlacementResult) -> Table:
    """A row of places per height: the rate of a patch there, and in brackets that of the strongest control."""
    table = Table(
        title=f"{found.what} by place of the patch: per cent (strongest control)",
        box=box.SIMPLE_HEAD,
        show_header=False,
        caption=f"{found.clean.n:,} images; clean: {_cell(found.clean)}; places from the top left to the bottom right",
    )
    for _ in found.places[0]:
        table.add_column("", justify="right")
    for row in found.places:
        cells = [f"{100 * one.rate.value:.1f}" + _beside(one.control) for one in row]
        table.add_row(*cells)
    return table


def placements_table(found: PlacementResult) -> Table:
    """One row per scale and angle: the rate of a patch, that of the strongest control, and the lead over it."""
    table = Table(
        title=f"{found.what} by scale and angle: per cent [95 % interval]",
        box=box.SIMPLE_HEAD,
        caption=_patterns(found.places[0][0].controls, found.whole.controls),
    )
    for name in ("placement", found.what, "strongest control", "lead, paired"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    rows = {"as crafted": found.whole} | {f"scale {one.at:g}": one for one in found.scales}
    rows |= {f"angle {one.at:g}": one for one in found.rotations}
    for name, one in rows.items():
        table.add_row(name, _cell(one.rate), _cell(one.control), "-" if one.lead is None else str(one.lead))
    return table


def _patterns(controls: Sequence[Control], crafted: Sequence[Control] = ()) -> str | None:
    """Say of how many patterns the strongest control is the worst, which differs from table to table."""
    drawn, whole = (max((one.draws for one in some), default=0) for some in (controls, crafted))
    more = f" ({whole} as crafted)" if whole > drawn else ""
    return f"strongest control: of {drawn} patterns of each kind{more}, its interval widened" if drawn else None


def _beside(control: Rate | None) -> str:
    return "" if control is None else f" ({100 * control.value:.1f})"


def _failed(result: AuditResult) -> str:
    states = [check.passed for check in result.checks]
    return f"{states.count(False)} of {len(states) - states.count(None)}"


def _worst(result: AuditResult) -> str:
    from gambeson.auditing.display import worst_of

    worst = worst_of(result)
    return _cell(None if worst is None else worst.accuracy)


def _transferred(result: AuditResult) -> str:
    return _cell(_highest([t.error for t in result.transfer]))


def _noise(result: AuditResult) -> str:
    return _cell(_highest([c.error for c in result.corruption]))


def _uer(eps: float) -> Cells:
    return lambda result: _cell(next((point.uer for point in result.universal if point.eps == eps), None))


def _iou(eps: float) -> Cells:
    return lambda result: _cell(next((p.iou.mean for p in result.universal if p.eps == eps and p.iou), None))


def _control(eps: float) -> Cells:
    def cell(result: AuditResult) -> str:
        return _cell(_highest([control.worst for p in result.universal if p.eps == eps for control in p.controls]))

    return cell


def _smallest(found: SmallestEps) -> str:
    return f"{'>' if found.censored else 'at most'} {found.value:.3f}{found.interval}"


def _highest(rates: Sequence[Rate]) -> Rate | None:
    """Return the highest of several rates, with the interval of a chosen one; None where there are none."""
    from gambeson.evaluation import Rate

    return Rate.highest(rates) if rates else None


def _cell(rate: Rate | None) -> str:
    return _NONE if rate is None else f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
