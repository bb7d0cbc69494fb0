"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from gambeson.evaluation import AuditResult, Rate


def audit_table(results: Sequence[AuditResult]) -> Table:
    """Clean accuracy, UER with interval and controls at each eps, PGD accuracy and eps_uni, a block a model."""
    table = Table(
        title=f"UER on {results[0].material.test} test images of {results[0].material.name}, with 95 % intervals"
    )
    table.add_column("model")
    table.add_column("perturbation")
    for point in results[0].universal:
        table.add_column(f"eps {point.eps:.3g}", justify="right")
    for name in ("clean acc.", "PGD acc.", "eps_uni"):
        table.add_column(name, justify="right")
    for result in results:
        found = result.eps_uni
        attacked = result.per_image[0]
        ends = (
            _short(result.clean),
            f"{_short(attacked.accuracy)}\nat {attacked.eps:.3g}",
            f"{'>' if found.censored else '≤'} {found.value:.3f}",
        )
        table.add_row(
            result.subject.label, "crafted", *[_short(point.uer) for point in result.universal], *ends
        )
        for row, control in enumerate(result.universal[0].controls):
            cells = [_short(point.controls[row].worst) for point in result.universal]
            name = control.name if control.draws == 1 else f"{control.name}, worst of {control.draws}"
            table.add_row("", name, *cells, style="dim")
        table.add_section()
    return table


def _short(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} %\n{100 * rate.low:.0f}–{100 * rate.high:.0f}"
