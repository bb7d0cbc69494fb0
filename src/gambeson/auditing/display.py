"""Results of audits in notebooks: their main lines, their rates as rows, and a figure that compares several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gambeson.base import eps_text, notebook
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import strongest_control


class Attacked(NamedTuple):
    """The worst of all per-image attacks at the middle eps."""

    accuracy: Rate
    """What stays right; its interval holds for all that were tried at once."""
    attack: str
    eps: float


def worst_attack(point: Any, per_image: Sequence[Any], transfer: Sequence[Any]) -> Attacked | None:
    """Return the per-image attack that leaves least right at the eps of ``point``; None if there was none."""
    at = (point.eps, point.norm)
    found = [(one.accuracy, one.attack) for one in per_image if (one.eps, one.norm) == at]
    found += [
        (one.error.complement, f"{one.attack} on {one.source}")
        for one in transfer
        if not one.universal and (one.eps, one.norm) == at
    ]
    if not found:
        return None
    attack = min(found, key=lambda entry: entry[0].value)[1]
    return Attacked(Rate.lowest(rate for rate, _ in found), attack, point.eps)


def worst_of(result: Any) -> Attacked | None:
    """Return the worst per-image attack of an ``AuditResult``, at its middle eps."""
    return worst_attack(result.middle, result.per_image, result.transfer)


def in_a_line(point: Any) -> str:
    """Return what was found at one eps, as a line."""
    control = strongest_control(point.controls)
    beside = "" if control is None else f", strongest control {control.worst} ({control.name})"
    return f"eps {eps_text(point.eps)}: UER {point.uer}{beside}"


def trust_in(result: Any) -> str:
    """Return whether the numbers of an ``AuditResult`` are trusted, in a few words."""
    failed = [check.name for check in result.checks if check.passed is False]
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        return "not trusted: failed " + ", ".join(failed[:3]) + more
    return "trusted" if result.verdict.trusted else "not all checked"


def doubt_of(result: Any) -> str:
    """Return what the numbers of an ``AuditResult`` are that are not trusted; empty if they are."""
    if any(check.passed is False for check in result.checks):
        return "not to be trusted"
    return "" if result.verdict.trusted else "not all checked"


def main_lines(result: Any) -> tuple[str, dict[str, str]]:
    """Return a title and the main numbers of an ``AuditResult`` by name."""
    point, found = result.middle, result.eps_uni
    each = worst_of(result)
    control = strongest_control(point.controls)
    lines = {
        "numbers": trust_in(result),
        "accuracy, clean": str(result.clean),
        "accuracy, per image": "not measured" if each is None else f"{each.accuracy} under {each.attack}",
        f"UER, eps {eps_text(point.eps)}": str(point.uer),
        "  strongest control": "none" if control is None else str(control.worst),
        f"eps_uni({found.delta:g})": f"{'>' if found.censored else 'at most'} {found.value:.3g}",
        "UER by eps": ", ".join(f"{eps_text(one.eps)}: {100 * one.uer.value:.0f} %" for one in result.universal),
    }
    if result.iou is not None and point.iou is not None:
        lines["mean IoU, clean"] = str(result.iou.mean)
        lines[f"mean IoU, eps {eps_text(point.eps)}"] = str(point.iou.mean)
    return f"Audit of {result.subject.label} on {result.material.test:,} test images of {result.material.name}", lines


def rates(result: Any) -> list[dict[str, Any]]:
    """Return every rate of an ``AuditResult`` with what it is of."""

    def row(what: str, rate: Rate, **about: Any) -> dict[str, Any]:
        return {"what": what, **about, **rate.plain()}

    def of(found: Any) -> dict[str, Any]:
        return {"attack": found.attack, "eps": found.eps, "norm": found.norm}

    rows = [row("clean accuracy", result.clean)]
    if result.iou is not None:
        rows += [row("mean IoU", result.iou.mean)]
        rows += [row("mean IoU", point.iou.mean, **of(point)) for point in result.universal if point.iou is not None]
    rows += [row("accuracy per image", one.accuracy, **of(one)) for one in result.per_image]
    for point in result.universal:
        rows += [row("UER", point.uer, **of(point)), row("fooling rate", point.fooling, **of(point))]
        rows += [row("UER of control", one.worst, **{**of(point), "attack": one.name}) for one in point.controls]
    if (found := result.edits) is not None:
        for one in found.rates:
            rows += [row("UER, edited", one.uer, **of(found), edit=one.edit)]
            rows += [row("clean error, edited", one.clean, edit=one.edit)]
    if (view := result.classes) is not None:
        for one in view.classes:
            rows += [row("UER of class", one.uer, **of(view), label=one.name)]
            rows += [row("class-wise UER of class", one.own, **of(view), label=one.name)] if one.own else []
        if view.auc is not None:
            rows += [row("AUC, clean", view.auc.clean), row("AUC", view.auc.perturbed, **of(view))]
    rows += [row("transfer error", one.error, **of(one), source=one.source) for one in result.transfer]
    for one in result.certified:
        rows += [row("certified accuracy per image", one.bounds.per_image, eps=one.bounds.eps)]
    return rows + [row("error under noise", one.error, attack=one.noise, eps=one.size) for one in result.corruption]


def plot_audits(results: Sequence[Any]) -> Any:
    """Return a ``plotly`` figure that compares audits: the UER of each against eps, and the strongest control.

    Args:
        results: ``Audit`` or ``AuditResult`` of models on the same data; equal labels are numbered.
    """
    results = [getattr(result, "results", result) for result in results]
    lines: dict[str, tuple[list[float], list[Rate]]] = {}
    times = Counter[str]()
    for result in results:
        eps, label = [point.eps for point in result.universal], result.subject.label
        times[label] += 1
        label += f" ({times[label]})" if times[label] > 1 else ""
        lines[label] = eps, [point.uer for point in result.universal]
        if all(point.controls for point in result.universal):
            worst = [strongest_control(point.controls) for point in result.universal]
            lines[f"{label}, strongest control"] = eps, [one.worst for one in worst if one is not None]
    title = f"Universal evasion rate, {results[0].material.name}"
    unit = results[0].material.unit
    units = "test images" if unit == "image" else f"{unit}s of test images"
    return notebook.curves(lines, title, f"eps ({results[0].middle.norm})", f"{units} misclassified (%)")
