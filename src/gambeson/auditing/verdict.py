"""From numbers and checks to words. A failed check turns the verdict, whatever the numbers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gambeson.auditing.display import Attacked, worst_attack
from gambeson.auditing.results import (
    AuditResult,
    CertifiedResult,
    Check,
    IoU,
    ModelInfo,
    PerImageResult,
    RandomnessResult,
    TargetedResult,
    TransferredResult,
    UniversalResult,
    Verdict,
)
from gambeson.base import eps_text
from gambeson.base.errors import some
from gambeson.evaluation import Rate
from gambeson.evaluation.classes import ClassView
from gambeson.evaluation.rates import EpsAdv, EpsUni, SmallestEps, strongest_control
from gambeson.evaluation.targeted import SHUFFLED


def judge(
    clean: Rate,
    points: list[UniversalResult],
    found: EpsUni,
    checks: list[Check],
    *,
    per_image: Sequence[PerImageResult] = (),
    transfer: Sequence[TransferredResult] = (),
    subject: ModelInfo | None = None,
    randomness: RandomnessResult | None = None,
    each: EpsAdv | None = None,
    left_out: str = "",
    unchecked: Sequence[str] = (),
    targeted: Sequence[TargetedResult] = (),
    unit: str = "image",
    iou: IoU | None = None,
    classes: ClassView | None = None,
    certified: Sequence[CertifiedResult] = (),
) -> Verdict:
    """State what one pattern does to the model at the middle eps, and whether that can be trusted.

    Args:
        clean: accuracy on clean test images.
        points: the crafted perturbations, in order of eps; the middle one is judged.
        found: eps_uni.
        each: eps_adv, where it was searched.
        checks: what the diagnostics saw that ran.
        per_image: accuracy under attacks that perturb each image by itself.
        transfer: error under what was crafted on other models.
        subject: the model.
        randomness: what a random model answers over many passes.
        targeted: what perturbations with a target reach.
        unit: what rates are shares of: images, or pixels of label maps. Then BROKEN means that half of all pixels are
            wrong (delta, ours); how classes fare that have few of them, the mean IoU tells.
        iou: of label maps, on clean test images.
        classes: what the pattern does to each class.
        certified: lower bounds on the accuracy at every eps.
        left_out: what a budget left out, as a sentence.
        unchecked: checks that did not run, for which no number can be trusted.
    """
    point = points[len(points) // 2]
    said = [
        left_out,
        _one_pattern(clean, point, found.delta, transfer, unit),
        *(_between(one) for one in certified if one.bounds.eps == point.eps),
        _mean_iou(point, iou),
        _by_class(classes),
        _per_image(worst_attack(point, per_image, transfer), unit, point.uer.n),
        *map(_aimed, targeted),
        _random(subject, randomness),
        eps_in_words(found, each),
    ]
    if subject is not None and subject.black_box and _worst(point, transfer).low < found.delta:
        said.append("Only queries were possible: an attack with gradients may do more, so not broken says less here.")
    failed = [check for check in checks if check.passed is False]
    if failed:
        names = ", ".join(check.name for check in failed)
        said.insert(0, f"Not to be trusted (failed: {names}).")
        said.append("What attacks did reach stands; the model may be weaker than these numbers.")
    reasons = [f"{check.name}: failed, {check.detail}. {check.explanation} {check.remedy}".rstrip() for check in failed]
    if unchecked:
        idle = sum(check.passed is None for check in checks)
        ran = f"{len(checks) - idle} of {len(checks) + len(unchecked)} checks were run"
        rest = f" and {idle} did not apply" if idle else ""
        if not failed:
            said.insert(1, f"Not checked for {some(unchecked, 3)}: {ran}, none failed{rest}.")
        reasons.append(f"{ran}{rest}. For the others run a larger suite, or give it more time.")
    return Verdict(
        trusted=not failed and not unchecked,
        summary=" ".join(filter(None, said)),
        reasons=reasons,
        unchecked=list(unchecked),
    )


def _tried(point: UniversalResult, transfer: Sequence[TransferredResult]) -> dict[str, Rate]:
    """Error under every pattern that was tried at this eps, by what to call it in a sentence; the chosen one first."""
    others = [one for one in transfer if one.universal and (one.eps, one.norm) == (point.eps, point.norm)]
    found = {_CRAFTED if point.crafted is None else _called(point.attack): point.uer}
    if point.crafted is not None:
        found[_CRAFTED] = point.crafted
    found |= {_called(control.name): control.worst for control in point.controls if control.name != point.attack}
    return found | {f"the one of {one.source}": one.error for one in others}


def _called(attack: str) -> str:
    return f"the {attack} pattern"


_CRAFTED = "it"


def _worst(point: UniversalResult, transfer: Sequence[TransferredResult]) -> Rate:
    """The highest error that any pattern reached at this eps; its interval holds for all that were tried at once."""
    return Rate.highest(_tried(point, transfer).values())


Outcome = Literal["broken", "withstands", "on the edge", "wrong without a pattern"]
"""What one pattern does to a model. ``broken`` and ``withstands``: the whole 95 % interval of the error lies at or
above delta (0.5), or below it; ``on the edge``: it holds delta; ``wrong without a pattern``: the clean error is that
high."""


class Lead(NamedTuple):
    """The pattern that a verdict leads with, at the middle eps."""

    outcome: Outcome
    pattern: str
    """``it``, or what to call a pattern that the suite did not craft by its own attack."""
    rate: Rate
    """The error under it."""


def lead_of(result: AuditResult) -> Lead:
    """Return what one pattern does to an audited model at the middle eps, whether or not that can be trusted."""
    return _lead(result.clean, result.middle, result.eps_uni.delta, result.transfer)


def _lead(clean: Rate, point: UniversalResult, delta: float, transfer: Sequence[TransferredResult]) -> Lead:
    """Take the pattern that validation chose; a model stands only where it withstood every one.

    Patterns that were not chosen are compared on test images, so that their intervals are simultaneous ones. Where one
    of those alone shows that the model is broken, it takes the lead.
    """
    tried, worst = _tried(point, transfer), _worst(point, transfer)
    name, rate = next(iter(tried.items()))
    if worst.low >= delta > rate.low:
        name, rate = max(tried, key=lambda one: tried[one].value), worst
    outcome: Outcome = "on the edge"
    if clean.complement.low >= delta:
        outcome = "wrong without a pattern"
    elif rate.low >= delta:
        outcome = "broken"
    elif worst.high < delta:
        outcome = "withstands"
    return Lead(outcome, name, rate)


def _one_pattern(
    clean: Rate, point: UniversalResult, delta: float, transfer: Sequence[TransferredResult], unit: str
) -> str:
    outcome, name, rate = _lead(clean, point, delta, transfer)
    share = f"{100 * delta:g} %"
    lead = {
        "wrong without a pattern": f"At an error of {share} before any pattern is added; under one",
        "broken": "Broken by one pattern",
        "withstands": f"Not brought to an error of {share} by one pattern",
        "on the edge": f"On the edge of an error of {share} under one pattern",
    }[outcome]
    against = f"{clean.complement} when clean"
    if name != _CRAFTED:
        against = f"{_tried(point, transfer)[_CRAFTED]} under the crafted one, {against}"
    rivals = [control for control in point.controls if _called(control.name) != name]
    if (rival := strongest_control(rivals)) is not None:
        kind = "strongest control" if len(rivals) == len(point.controls) else "strongest other control"
        against += f" and {rival.worst} under the {kind} ({rival.name})"
    subject = "it misclassifies" if name == _CRAFTED else f"{name} misclassifies"
    units = "test images" if unit == "image" else f"the {unit}s of test images"
    said = f"{lead} at eps {eps_text(point.eps)}: {subject} {rate} of {units}, against {against}."
    if outcome == "on the edge" and rate.high < delta:
        most = 100 * _worst(point, transfer).high
        said += (
            f" The error under the worst of the patterns tried may be as high as {most:.1f} %: more images would tell."
        )
    return said


def _between(found: CertifiedResult) -> str:
    bounds, attacked = found.bounds, found.attacked
    return (
        f"On {attacked.n} of the test images the accuracy under any one pattern of eps {eps_text(bounds.eps)} lies "
        f"between {100 * bounds.universal:.1f} % (certified) and {100 * attacked.value:.1f} % (attacked)."
    )


def _per_image(worst: Attacked | None, unit: str, images: int) -> str:
    if worst is None:
        return ""
    units = "" if unit == "image" else f" of {unit}s"
    if unit == "image" and worst.accuracy.n != images:
        units = f" of {worst.accuracy.n} of these images"
    return f"Under the worst per-image attack ({worst.attack}), {worst.accuracy}{units} stay right."


def _by_class(found: ClassView | None) -> str:
    if found is None or len(found.classes) < 2:
        return ""
    low, high = found.best, found.worst
    said = f"By class, the UER runs from {low.uer} ({low.name}) to {high.uer} ({high.name})"
    if found.auc is not None:
        said += f", and the AUC is {found.auc.perturbed} under the pattern, {found.auc.clean} when clean"
    own = [one.own.value for one in found.classes if one.own is not None]
    if own:
        said += f"; with a pattern for each class, its mean over the classes is {100 * sum(own) / len(own):.1f} %"
    return f"{said}."


def _mean_iou(point: UniversalResult, iou: IoU | None) -> str:
    if iou is None or point.iou is None:
        return ""
    return f"The mean IoU is {point.iou.mean} under the pattern, {iou.mean} when clean."


def _aimed(found: TargetedResult) -> str:
    reached = found.reached
    chance = next((one for one in reached.controls if one.name == SHUFFLED), None)
    if reached.hidden is None or reached.kept is None:
        beside = "" if chance is None else f", and {chance.success} by chance, of other scenes"
        return (
            f"Aimed at one scene ({found.target}), one pattern makes {reached.success} of pixels show it, against "
            f"{reached.clean} when clean{beside}."
        )
    name = found.target.partition(":")[2]
    return f"Made to hide {name}, one pattern hides {reached.hidden} of its pixels and keeps {reached.kept} of others."


def _random(subject: ModelInfo | None, randomness: RandomnessResult | None) -> str:
    if randomness is None:
        return "The model is random." if subject is not None and subject.random else ""
    if randomness.votes == 1:
        return "The model is random, and one pass decided every image."
    quiet = f"; with its noise off it gets {randomness.noise_off}" if randomness.noise_off is not None else ""
    return (
        f"The model is random: the majority of {randomness.votes} passes decides an image, and a single pass gets "
        f"{100 * randomness.mean:.1f} % ± {100 * randomness.spread:.1f} of the clean ones{quiet}."
    )


def eps_in_words(found: EpsUni, each: EpsAdv | None) -> str:
    """Return eps_uni, and eps_adv beside it, as a sentence."""
    beside = "" if each is None else f", eps_adv({each.delta:g}) {_bound(each)}"
    return f"eps_uni({found.delta:g}) is {_bound(found)}{beside}."


def _bound(found: SmallestEps) -> str:
    return f"{'more than' if found.censored else 'at most'} {found.value:.3g}{found.interval}"
