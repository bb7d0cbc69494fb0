"""Results as a table for the terminal, narrow enough for 80 columns and three models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from gambeson.auditing import AuditResult
from gambeson.evaluation import Rate


def audit_table(results: Sequence[AuditResult]) -> Table:
    """A column a model: clean accuracy, UER and its controls at each eps, PGD accuracy and eps_uni."""
    first = results[0]
    table = Table(
        title=f"{first.material.test} test images of {first.material.name}: per cent [95 % interval]",
        box=box.SIMPLE_HEAD,
        caption="UER: share of test images that one perturbation makes the model get wrong",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.subject.label, justify="right", no_wrap=True)

    def row(name: str, cell: Callable[[AuditResult], str], style: str | None = None) -> None:
        table.add_row(name, *[cell(result) for result in results], style=style)

    row("clean accuracy", lambda result: _cell(result.clean))
    for k, point in enumerate(first.universal):
        table.add_section()
        row(f"UER at eps {point.eps:.3g}", lambda result, k=k: _cell(result.universal[k].uer), "bold")  # type: ignore[misc]
        for j, control in enumerate(point.controls):
            name = control.name if control.draws == 1 else f"{control.name} (worst)"
            row(f"  {name}", lambda result, k=k, j=j: _cell(result.universal[k].controls[j].worst), "dim")  # type: ignore[misc]
    table.add_section()
    attacked = first.per_image[0]
    row(f"PGD accuracy at eps {attacked.eps:.3g}", lambda result: _cell(result.per_image[0].accuracy))
    row(
        f"eps_uni({first.eps_uni.delta:g})",
        lambda result: f"{'>' if result.eps_uni.censored else 'at most'} {result.eps_uni.value:.3f}",
    )
    return table


def _cell(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
