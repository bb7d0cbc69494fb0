"""Settings, cost and versions of an audit, as lists of names and values."""

from __future__ import annotations

from dataclasses import dataclass

from gambeson.report import words
from gambeson.report.folders import Folder
from gambeson.report.words import Scale


@dataclass(frozen=True)
class Facts:
    """A titled list of names and values."""

    title: str
    rows: list[tuple[str, str]]


def collect(folder: Folder, scale: Scale) -> list[Facts]:
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
        ("crafted on (training split)", words.count(material.train, "image")),
        ("chosen on (validation split)", words.count(material.validation, "image")),
        ("reported on (test split)", words.count(material.test, "image")),
    ]
    points = []
    for point in result.universal:
        starts = ", ".join(f"{start.start} {words.percent(start.validation_uer)}" for start in point.restarts)
        text = f"fooling rate {point.fooling}; restarts on the validation split: {starts or 'none'}"
        points.append((f"eps {scale.text(point.eps)}", text))
    tried = ", ".join(f"{eps:.4g}: {words.percent(uer)}" for eps, uer in found.tried)
    search = [("judged on", f"{found.split} split"), ("eps tried, with UER", tried or "none")]
    cost = [("forwards", words.count(result.cost.forwards, "image"))]
    cost += [("backwards", words.count(result.cost.backwards, "image"))]
    if folder.seconds:
        cost += [("time", words.duration(sum(folder.seconds.values())))]
        cost += [(f"time of {stage}", words.duration(spent)) for stage, spent in folder.seconds.items()]
    defence = words.flat(subject.defense) if subject.defense else [("defence", "not known")]
    per_image = [Facts(f"Attack on each image: {a.attack}", words.flat(a.settings)) for a in result.per_image]
    return [
        Facts("Model", model),
        Facts("Defence", defence),
        Facts("Data", splits),
        Facts("Suite", [("seed", str(result.seed)), *words.flat(result.settings)]),
        *per_image,
        Facts("Universal perturbations", points),
        Facts(f"Search of eps_uni({found.delta:g})", search),
        Facts("Cost", cost),
        Facts("Versions", words.flat(result.environment)),
    ]
