"""Settings, cost and versions of an audit, as lists of names and values."""

from __future__ import annotations

from dataclasses import dataclass

from gambeson.evaluation.rates import Cost
from gambeson.report import formatting
from gambeson.report.formatting import EpsFormat
from gambeson.report.loading import Folder


@dataclass(frozen=True)
class Facts:
    """A titled list of names and values."""

    title: str
    rows: list[tuple[str, str]]


def collect(folder: Folder, scale: EpsFormat) -> list[Facts]:
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
        ("crafted on (training split)", formatting.count(material.train, "image")),
        ("chosen on (validation split)", formatting.count(material.validation, "image")),
        ("reported on (test split)", formatting.count(material.test, "image")),
    ]
    points = []
    for point in result.universal:
        starts = ", ".join(f"{start.start} {formatting.percent(start.validation_uer)}" for start in point.restarts)
        text = f"fooling rate {point.fooling}; restarts on the validation split: {starts or 'none'}"
        points.append((f"eps {scale.text(point.eps)}", text))
    tried = ", ".join(f"{eps:.4g}: {formatting.percent(uer)}" for eps, uer in found.tried)
    search = [("judged on", f"{found.split} split"), ("eps tried, with UER", tried or "none")]
    search += [("95 % interval, by bootstrap over test images", found.interval.strip())] if found.interval else []
    if (each := result.eps_adv) is not None:
        size = f"{formatting.bound(each)[0]}{each.interval}, on {formatting.count(each.images, 'image')}"
        search += [(f"eps_adv({each.delta:g}), image by image", size)]
    cost = [("all of it", _cost(result.cost)), *_costs(folder, scale)]
    if folder.seconds:
        cost += [("time", formatting.duration(sum(folder.seconds.values())))]
        cost += [(f"time of {stage}", formatting.duration(spent)) for stage, spent in folder.seconds.items()]
    defence = formatting.flat(subject.defense) if subject.defense else [("defence", "not known")]
    per_image = [Facts(f"Attack on each image: {a.attack}", formatting.flat(a.settings)) for a in result.per_image]
    return [
        Facts("Model", model),
        Facts("Defence", defence),
        Facts("Data", splits),
        Facts("Suite", [("seed", str(result.seed)), *formatting.flat(result.settings)]),
        *per_image,
        Facts("Universal perturbations", points),
        Facts(f"Search of eps_uni({found.delta:g})", search),
        Facts("Cost, in images sent forward and backward", cost),
        Facts("Versions", formatting.flat(result.environment)),
    ]


def _costs(folder: Folder, scale: EpsFormat) -> list[tuple[str, str]]:
    result = folder.result
    rows = [(f"universal, eps {scale.text(point.eps)}", point.cost) for point in result.universal]
    rows += [(f"eps_uni({result.eps_uni.delta:g})", result.eps_uni.cost)]
    rows += [(f"eps_adv({each.delta:g})", each.cost)] if (each := result.eps_adv) else []
    rows += [(f"{a.attack}, eps {scale.text(a.eps)}", a.cost) for a in result.per_image]
    rows += [(f"{t.attack} from {t.source}, eps {scale.text(t.eps)}", t.cost) for t in result.transfer]
    rows += [("Jacobian analysis", result.jacobian.cost)] if result.jacobian else []
    return [(name, _cost(cost)) for name, cost in rows]


def _cost(cost: Cost) -> str:
    return f"{cost.forwards:,} forward, {cost.backwards:,} backward"
