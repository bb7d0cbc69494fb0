"""Formatting of numbers, and the settings, cost and versions of an audit as lists of names and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gambeson.base import count, duration, eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import Cost, SmallestEps
from gambeson.report.loading import Folder
from gambeson.tasks import Difference


def percent(value: float) -> str:
    """Write a share with one decimal: ``12.3 %``."""
    return f"{100 * value:.1f} %"


def of_hundred(value: float) -> str:
    """Write a share as a number out of 100: ``56``; neither 0 nor 100 unless it is exact."""
    if 0 < value < 0.005:
        return "fewer than 1"
    if 0.995 <= value < 1:
        return "more than 99"
    return f"{math.floor(100 * value + 0.5)}"


def interval(rate: Rate | Difference) -> str:
    """Write the ends of the 95 % interval, in per cent or points: ``[11.0, 13.7]``."""
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def decimal(eps: float) -> str:
    """Write eps as a decimal if :func:`gambeson.base.eps_text` does not; else empty."""
    return "" if eps_text(eps) == (plain := f"{eps:.4g}") else plain


def meaning_of_eps(norm: str) -> str:
    """Say what eps measures."""
    return "largest change of a pixel" if norm == "inf" else "Euclidean length of the pattern"


def bound(found: SmallestEps) -> tuple[str, ...]:
    """Write the smallest eps, its interval if there is one, and a note."""
    ends = () if found.low is None else (found.interval.strip(),)
    if found.censored:
        return f"> {found.value:.3g}", *ends, "no success up to there"
    if found.value == 0:
        return "0", *ends, "reached without any pattern"
    low = max(0.0, found.value - found.tolerance)
    return f"≤ {found.value:.3g}", *ends, f"no success at {low:.3g}" if low else "smallest eps tried"


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Write settings as rows of name and value; the name of a nested one is joined by dots."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


@dataclass(frozen=True)
class Facts:
    """A titled list of names and values."""

    title: str
    rows: list[tuple[str, str]]


def collect(folder: Folder) -> list[Facts]:
    """List model, defence, data, settings, perturbations, search, cost and versions of one audit."""
    result = folder.result
    subject, material, found = result.subject, result.material, result.eps_uni
    model = [("architecture", subject.name), ("trainable values", f"{subject.parameters:,}")]
    model += [] if subject.epochs is None else [("epochs", str(subject.epochs))]
    model += [("hash of the weights", subject.fingerprint)]
    splits = [
        ("data set", material.name),
        ("classes", ", ".join(material.classes)),
        ("image (channels, height, width)", " x ".join(str(side) for side in material.shape)),
        ("crafted on (training split)", count(material.train, "image")),
        ("chosen on (validation split)", count(material.validation, "image")),
        ("reported on (test split)", count(material.test, "image")),
    ]
    points = []
    for point in result.universal:
        starts = ", ".join(f"{start.start} {percent(start.validation_uer)}" for start in point.restarts)
        text = f"fooling rate {point.fooling}; restarts on the validation split: {starts or 'none'}"
        points.append((f"eps {eps_text(point.eps)}", text))
    tried = ", ".join(f"{eps:.4g}: {percent(uer)}" for eps, uer in found.tried)
    search = [("judged on", f"{found.split} split"), ("eps tried, with UER", tried or "none")]
    search += [("95 % interval, by bootstrap over test images", found.interval.strip())] if found.interval else []
    if (each := result.eps_adv) is not None:
        size = f"{bound(each)[0]}{each.interval}, on {count(each.images, 'image')}"
        search += [(f"eps_adv({each.delta:g}), per image", size)]
    cost = [("all of it", _cost(result.cost)), *_costs(folder)]
    if folder.seconds:
        cost += [("time", duration(sum(folder.seconds.values())))]
        cost += [(f"time of {stage}", duration(spent)) for stage, spent in folder.seconds.items()]
    defence = flat(subject.defense) if subject.defense else [("defence", "not known")]
    per_image = [Facts(f"Attack on each image: {a.attack}", flat(a.settings)) for a in result.per_image]
    return [
        Facts("Model", model),
        Facts("Defence", defence),
        Facts("Data", splits),
        Facts("Suite", [("seed", str(result.seed)), *flat(result.settings)]),
        *per_image,
        Facts("Universal perturbations", points),
        Facts(f"Search of eps_uni({found.delta:g})", search),
        Facts("Cost, in images sent forward and backward", cost),
        Facts("Versions", flat(result.environment)),
    ]


def _costs(folder: Folder) -> list[tuple[str, str]]:
    result = folder.result
    rows = [(f"universal, eps {eps_text(point.eps)}", point.cost) for point in result.universal]
    rows += [(f"eps_uni({result.eps_uni.delta:g})", result.eps_uni.cost)]
    rows += [(f"eps_adv({each.delta:g})", each.cost)] if (each := result.eps_adv) else []
    rows += [(f"{a.attack}, eps {eps_text(a.eps)}", a.cost) for a in result.per_image]
    rows += [(f"{t.attack} from {t.source}, eps {eps_text(t.eps)}", t.cost) for t in result.transfer]
    rows += [("Jacobian analysis", result.jacobian.cost)] if result.jacobian else []
    return [(name, _cost(cost)) for name, cost in rows]


def _cost(cost: Cost) -> str:
    return f"{cost.forwards:,} forward, {cost.backwards:,} backward"
