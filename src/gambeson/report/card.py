"""A fragment for model cards: the numbers of an audit as Markdown, and as metadata in the form of a model index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gambeson.auditing import AuditResult
from gambeson.auditing.display import doubt_of, worst_of
from gambeson.base import count, eps_text, replaceable, write_text
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import SmallestEps


def write_card(result: AuditResult, out: str | Path) -> Path:
    """Write one Markdown file: metadata between two lines of dashes, and a section with the same numbers as a table.

    The metadata is a ``model-index``, which model hubs read from the head of a model card. Every number carries its
    attack, eps and norm, its 95 % interval and number of images; a number of an audit that is not to be trusted says so
    in its name.

    Args:
        result: of a finished audit.
        out: the file, replaced atomically.
    """
    head = yaml.safe_dump({"model-index": [_index(result)]}, sort_keys=False, allow_unicode=True, width=100)
    replaceable(Path(out), "a model card")
    write_text(Path(out), f"---\n{head}---\n\n{_section(result)}")
    return Path(out)


def _index(result: AuditResult) -> dict[str, Any]:
    unit = result.material.unit
    return {
        "name": result.subject.label,
        "results": [
            {
                "task": {"type": "image-classification" if unit == "image" else "image-segmentation"},
                "dataset": {"type": result.material.name, "name": result.material.name, "split": "test"},
                "metrics": [_metric(*row, result) for row in _numbers(result)],
            }
        ],
    }


def _numbers(result: AuditResult) -> list[tuple[str, str, Rate | SmallestEps, dict[str, Any]]]:
    """Every number of the card: its kind, its name, itself, and what it is of."""
    pixels = "" if result.material.unit == "image" else "pixel "
    rows: list[tuple[str, str, Rate | SmallestEps, dict[str, Any]]]
    rows = [("accuracy", f"{pixels}accuracy, clean", result.clean, {})]
    if result.iou is not None:
        rows.append(("mean_iou", "mean IoU, clean", result.iou.mean, {}))
    for point in result.universal:
        about = {"attack": point.attack, "eps": round(point.eps, 6), "norm": point.norm}
        rows.append(("universal_evasion_rate", "error under one perturbation for all images (UER)", point.uer, about))
        if point.iou is not None:
            rows.append(("mean_iou", "mean IoU under one perturbation for all images", point.iou.mean, about))
    worst = worst_of(result)
    if worst is not None:
        about = {"attack": worst.attack, "eps": round(worst.eps, 6), "norm": result.middle.norm}
        rows.append(("accuracy", f"{pixels}accuracy under the worst attack per image", worst.accuracy, about))
    norm = {"norm": result.middle.norm}
    found = result.eps_uni
    rows.append(("eps_uni", f"smallest eps of one perturbation with an error of {found.delta:g}", found, norm))
    if result.eps_adv is not None:
        name = f"smallest eps per image with an error of {result.eps_adv.delta:g}"
        rows.append(("eps_adv", name, result.eps_adv, norm))
    return rows


def _metric(
    kind: str, name: str, number: Rate | SmallestEps, about: dict[str, Any], result: AuditResult
) -> dict[str, Any]:
    args = {**about, "seed": result.seed, "gambeson": result.environment.get("gambeson", "unknown")}
    name += f", eps {eps_text(about['eps'])}" if "eps" in about else ""
    if isinstance(number, Rate):
        args |= {"images": number.n}
    elif number.censored:
        name += f" (more than {number.value:.4g})"
    ends = {"low": number.low, "high": number.high}
    args |= {f"interval_{end}": round(value, 6) for end, value in ends.items() if value is not None}
    if about and (doubt := doubt_of(result)):
        name += f" ({doubt})"
    return {"type": kind, "name": name, "value": round(number.value, 6), "args": args}


def _section(result: AuditResult) -> str:
    settings, material, environment = result.settings, result.material, result.environment
    failed = [check for check in result.checks if check.passed is False]
    passed = sum(check.passed is True for check in result.checks)
    checks = f"{passed} of {passed + len(failed)} checks for obfuscated gradients and other faults passed"
    steps = [
        f"{count(int(settings[f'{kind}_steps']), 'step')} from {count(int(settings[f'{kind}_restarts']), 'start')}"
        for kind in ("universal", "pgd")
    ]
    made = [f"{name} {environment[name]}" for name in ("gambeson", "torch", "device") if name in environment]
    return "\n".join(
        [
            "## Adversarial robustness",
            "",
            _cell(result.verdict.summary),
            "",
            "| | value, 95 % interval | attack |",
            "|---|---|---|",
            *(f"| {_cell(name)} | {_written(it)} | {_conditions(about)} |" for _, name, it, about in _numbers(result)),
            "",
            f"{checks}{': ' if failed else '.'}"
            + "; ".join(f"{_cell(check.name)} failed ({_cell(check.detail)})" for check in failed),
            "",
            f"Measured on {material.test:,} test images of {_cell(material.name)}. Perturbations for all images: "
            f"crafted on {count(material.train, 'training image')}, selected on {material.validation:,} others, "
            f"{steps[0]}. PGD: {steps[1]}. Seed {result.seed}. An attack gives an upper bound on robustness: a "
            "stronger one may find more.",
            "",
            f"Model: {_cell(result.subject.name)}, {result.subject.parameters:,} parameters, weights "
            f"`{result.subject.fingerprint}`. Made with {', '.join(made)}.",
            "",
        ]
    )


def _written(number: Rate | SmallestEps) -> str:
    if isinstance(number, Rate):
        return f"{number} of {number.n:,}"
    return f"{'more than' if number.censored else 'at most'} {number.value:.4g}{number.interval}"


def _conditions(about: dict[str, Any]) -> str:
    said = about | ({"eps": f"eps {eps_text(about['eps'])}"} if "eps" in about else {})
    return _cell(", ".join(f"norm {it}" if name == "norm" else str(it) for name, it in said.items()))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
