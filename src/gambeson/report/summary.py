"""What a reader sees first: the answer in one sentence and one figure, two badges, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gambeson.auditing import AuditResult, lead_of
from gambeson.auditing.display import doubt_of, worst_of
from gambeson.base import count, eps_text
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import strongest_control
from gambeson.models import zoo
from gambeson.models.loading import trained_on
from gambeson.models.storage import ENDINGS
from gambeson.report.formatting import of_hundred
from gambeson.report.loading import Folder


@dataclass(frozen=True)
class Badge:
    """A word that is read on its own, with the kind of its colour and a mark for those who see none."""

    word: str
    kind: str
    mark: str


_OUTCOMES = {
    "broken": Badge("broken", "broken", "✗"),
    "withstands": Badge("withstands", "withstands", "✓"),
    "on the edge": Badge("on the edge", "edge", "≈"),
    "wrong without a pattern": Badge("wrong without a pattern", "broken", "✗"),
}
_WIDE = 0.1
"""Width of an interval that more test images would make clearly narrower."""
_UNDECIDED = Badge("undecided", "undecided", "?")
"""Stands for ``withstands`` where the measurement is not trusted: what attacks reached stands, what they missed not."""


@dataclass(frozen=True)
class Step:
    """Something to do next: why, and a command to copy."""

    text: str
    command: str
    python: bool = False


@dataclass(frozen=True)
class Summary:
    """The answer about one model."""

    badges: list[Badge]
    """What the pattern does, and whether the measurement is trusted; none before there are checks."""
    hedge: str
    """``at least``, with a space, where the measurement is not trusted."""
    wrong: str
    """Wrong answers under the pattern, of 100."""
    clean: str
    """Wrong answers without it, of 100."""
    unit: str
    """``image`` or ``pixel``."""
    squares: list[str]
    """Of each of 100 squares the kind: ``clean`` (as many are wrong without the pattern), ``flipped`` (more with it) or
    empty (right)."""
    facts: list[str]
    """Sentences below it: the interval, and what noise and per-image attacks do."""
    steps: list[Step] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    """What the audit left out."""


def squares(wrong: Rate, clean: Rate) -> list[str]:
    """Return the kinds of 100 squares."""
    anyway, all_of_them = round(100 * min(clean.value, wrong.value)), round(100 * wrong.value)
    return ["clean"] * anyway + ["flipped"] * (all_of_them - anyway) + [""] * (100 - all_of_them)


def first(wrong: Rate, clean: Rate, eps: float, norm: str) -> Summary:
    """Return the answer before anything else is measured: errors on images under one pattern and without it."""
    return Summary(
        badges=[],
        hedge="",
        wrong=of_hundred(wrong.value),
        clean=of_hundred(clean.value),
        unit="image",
        squares=squares(wrong, clean),
        facts=[_interval(wrong), _strength(eps, norm)],
    )


def summary(folder: Folder, norm: str) -> Summary:
    """Return the answer about one audited model."""
    result, lead = folder.result, lead_of(folder.result)
    point, clean = result.middle, result.clean.complement
    facts = [_interval(lead.rate), _strength(point.eps, norm)]
    if (control := strongest_control(point.controls)) is not None:
        most = of_hundred(control.worst.value)
        facts.append(f"Of patterns of the same strength that know nothing of it, the worst: {most} of 100.")
    if result.iou is not None and point.iou is not None:
        facts.append(
            "Averaged over classes, the overlap of prediction and truth (mean IoU) is "
            f"{of_hundred(point.iou.mean.value)} of 100 with it and {of_hundred(result.iou.mean.value)} without."
        )
    if (each := worst_of(result)) is not None:
        broken = of_hundred(each.accuracy.complement.value)
        units = "" if folder.unit == "image" else f" {folder.unit}s"
        facts.append(f"Attacked with a pattern of its own for every image, it is wrong on {broken} of 100{units}.")
    trusted = folder.trusted
    outcome = _UNDECIDED if lead.outcome == "withstands" and not trusted else _OUTCOMES[lead.outcome]
    if outcome.word == "withstands":
        outcome = replace(outcome, word=f"withstands eps {eps_text(point.eps)}")
        tried = (
            1
            + sum(one.draws for one in point.controls)
            + sum(one.universal and one.eps == point.eps for one in result.transfer)
        )
        facts.append(
            f"It withstood {count(tried, 'pattern')} of this strength: the one made for it, those that know nothing of "
            "it, and those made for other models. Stronger ones, and longer searches, may do more."
        )
    measured = Badge("measurement checked", "checked", "✓") if trusted else Badge("not trusted", "doubted", "!")
    if not trusted and not any(check.passed is False for check in result.checks):
        measured = Badge("not all checked", "doubted", "!")
    return Summary(
        badges=[outcome, measured],
        hedge="" if trusted else "at least ",
        wrong=of_hundred(lead.rate.value),
        clean=of_hundred(clean.value),
        unit=folder.unit,
        squares=squares(lead.rate, clean),
        facts=facts,
        steps=_steps(folder),
        limits=list(result.notes),
    )


def _interval(rate: Rate) -> str:
    return (
        f"For this pattern the number lies between {100 * rate.low:.1f} and {100 * rate.high:.1f} of 100 (95 % "
        f"interval, from {count(rate.n, 'test image')} that had no part in making it)."
    )


def _strength(eps: float, norm: str) -> str:
    if norm == "inf":
        return f"The pattern changes no pixel by more than {eps_text(eps)} of the way from black to white (eps)."
    return f"The pattern has a length of {eps_text(eps)} in the norm {norm} (eps), pixels running from 0 to 1."


def answer(folders: Sequence[Folder], eps: float | None) -> str:
    """Compare several models: the weakest, and the strongest of those whose numbers are trusted."""
    if eps is None:
        return "The audits share no eps, so their rates cannot be compared: compare eps_uni in the table."
    weakest = max(folders, key=lambda folder: folder.at(eps).uer.value)
    worst = Rate.highest(folder.at(eps).uer for folder in folders)
    doubt = "" if weakest.trusted else f" (numbers that are {doubt_of(weakest.result)})"
    units = f"of 100 test {weakest.unit}s"
    first = (
        f"At eps {eps_text(eps)} one pattern makes {quoted(weakest.label)}{doubt} wrong on "
        f"{of_hundred(worst.value)} {units}; without it, on {of_hundred(weakest.result.clean.complement.value)}."
    )
    trusted = [folder for folder in folders if folder.trusted]
    if not trusted:
        failed = any(check.passed is False for folder in folders for check in folder.result.checks)
        why = "is trusted" if failed else "was checked in full"
        return f"{first} No model can be called robust, because none of the measurements {why}."
    strongest = min(trusted, key=lambda folder: folder.at(eps).uer.value)
    least = Rate.lowest(folder.at(eps).uer for folder in trusted)
    among = "" if len(trusted) == len(folders) else " of those whose measurement is trusted"
    if strongest is weakest:
        return f"{first} It is the only one whose measurement is trusted."
    tie = " Their 95 % intervals overlap, so this order is not certain." if least.high >= worst.low else ""
    return (
        f"{first} {quoted(strongest.label)} stands best{among}: the pattern made for it makes it wrong on "
        f"{of_hundred(least.value)}.{tie}"
    )


def quoted(label: str) -> str:
    """Put a name into quotation marks."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}"


def _steps(folder: Folder) -> list[Step]:
    result, outcome = folder.result, lead_of(folder.result).outcome
    eps = eps_text(result.middle.eps)
    failed = [check for check in result.checks if check.passed is False]
    steps: list[Step | None] = []
    if failed:
        text = f"Find out why {quoted(failed[0].name)} failed: {failed[0].remedy} An attack that needs no gradient:"
        steps.append(_attack(folder, eps, text))
    if outcome == "wrong without a pattern":
        text = "It is wrong on clean images already: check first that data, classes and normalisation are its own, or"
        steps.append(_train(folder, "standard", eps, f"{text} train it:"))
    elif outcome == "broken":
        steps.append(_train(folder, "shared-adversarial", eps, "Train it to withstand one pattern for all images:"))
    elif not failed:
        aim = "decide it" if outcome == "on the edge" else "try harder to break it"
        most = result.settings.get("test_images")
        more = " and on more images" if most is not None and most <= result.material.test else ""
        few = f"{result.material.test} test images are few: more of them decide best. " if _few(result) else ""
        steps.append(_audit(folder, eps, f"{few}To {aim}, attack longer{more}:"))
    each = worst_of(result)
    if outcome == "withstands" and each is not None and each.accuracy.high < 1 - result.eps_uni.delta:
        text = "A pattern of its own for every image does break it. Train against that:"
        steps.append(_train(folder, "pgd-adversarial", eps, text))
    return [step for step in steps if step is not None]


def _few(result: AuditResult) -> bool:
    """Whether the interval of the error is wide because few test images tell it."""
    return result.middle.uer.high - result.middle.uer.low > _WIDE


def _attack(folder: Folder, eps: str, text: str) -> Step:
    if "model" not in folder.settings:
        return Step(text, f'gb.attacks.create("square", eps={eps})(model, images, labels)', python=True)
    return Step(text, f"gambeson attack {_source(folder)} --attack square --eps {eps} --images 100")


def _audit(folder: Folder, eps: str, text: str) -> Step:
    result = folder.result
    if "model" not in folder.settings:
        return Step(text, 'gb.audit(model, data, suite="full", out="runs/full-audit")', python=True)
    budget = result.settings.get("budget")
    more = "" if budget is None else f" --budget {4 * budget}"
    if own := result.settings.get("attacks"):
        more += f" --set {shlex.quote(f'suite.attacks={json.dumps(list(own))}')}"
    return Step(
        f"{text.removesuffix(':')} (it may take hours; with --plan it says how many):" if text else text,
        f"gambeson audit {_source(folder, '')} --suite full --eps {eps}{more} --out {_beside(folder, 'full-audit')}",
    )


def _train(folder: Folder, defense: str, eps: str, text: str) -> Step | None:
    """A training that begins from the model, where there is one that can be trained."""
    result = folder.result
    if result.subject.black_box:
        return Step(
            "Only queries were possible, so whoever has its weights must harden it. Or look further:",
            _audit(folder, eps, "").command,
        )
    with_eps = "" if defense == "standard" else f" --eps {eps}"
    if "model" not in folder.settings:
        of = "" if defense == "standard" else f", eps={eps}"
        made = f'gb.defenses.create("{defense}"{of})'
        return Step(text, f'gb.train(model, data, {made}, epochs=10, out="runs/hardened")', python=True)
    model = str(folder.settings["model"])
    if model.endswith((".pt2", ".onnx")) or "?normalise=" in model:
        return None
    architecture, _, weights = model.partition("@")
    stored = model.startswith(zoo.PREFIX) or (model == architecture and model.endswith(".safetensors"))
    if result.subject.epochs is not None or stored:
        architecture, weights = result.subject.name, model
    elif not weights.lower().endswith(ENDINGS):  # no file: weights by name
        architecture, weights = model, ""
    parts = ["--data", _data(folder), "--model", architecture, "--defense", defense]
    command = f"gambeson train {shlex.join(parts)}{with_eps}"
    command += f" --init {shlex.quote(weights)}" if weights else ""
    out = _beside(folder, "trained" if defense == "standard" else "hardened")
    return Step(text, f"{command} --out {out}\ngambeson audit {out} --eps {eps}")


def _beside(folder: Folder, what: str) -> str:
    """A folder for what is made of the model: beside its own, or under ``runs``."""
    model = str(folder.settings["model"])
    return f"runs/{what}" if set(model) & set(":@") else shlex.quote(f"{model.rstrip('/')}-{what}")


def _source(folder: Folder, flag: str = "--model ") -> str:
    return f"{flag}{shlex.quote(str(folder.settings['model']))} --data {shlex.quote(_data(folder))}"


def _data(folder: Folder) -> str:
    """The data as commands name it: what the audit was given, or that of the run that left the model."""
    if data := folder.settings.get("data"):
        return str(data)
    model = str(folder.settings["model"])  # not there where the page is made elsewhere
    return str((trained_on(model) if Path(model).is_dir() else None) or folder.result.material.name)
