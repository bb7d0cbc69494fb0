"""From numbers and checks to words. A failed check turns the verdict, whatever the numbers say."""

from __future__ import annotations

from collections.abc import Sequence

from gambeson.auditing.results import Check, Draws, PerImage, Subject, Transferred, Universal, Verdict
from gambeson.evaluation import Rate
from gambeson.evaluation.results import EpsUni


def judge(
    clean: Rate,
    points: list[Universal],
    found: EpsUni,
    checks: list[Check],
    *,
    per_image: Sequence[PerImage] = (),
    transfer: Sequence[Transferred] = (),
    subject: Subject | None = None,
    draws: Draws | None = None,
) -> Verdict:
    """State what one pattern does to the model at the middle eps, and whether that can be trusted.

    Args:
        clean: accuracy on clean test images.
        points: the crafted perturbations, in order of eps; the middle one is judged.
        found: eps_uni.
        checks: what the diagnostics saw.
        per_image: accuracy under attacks that perturb each image by itself.
        transfer: error under what was crafted on other models; a universal one that does more harm than the crafted
            one at the middle eps takes its place.
        subject: the model.
        draws: what a random model answers over many passes.
    """
    point = points[len(points) // 2]
    said = [
        _one_pattern(clean, point, found.delta, transfer),
        _image_by_image(point, per_image, transfer),
        _random(subject, draws),
        _eps_uni(found),
    ]
    if subject is not None and subject.black_box and _worst(point, transfer)[0].low < found.delta:
        said.append("Only queries were possible: an attack with gradients may do more, so not broken says less here.")
    failed = [check for check in checks if check.passed is False]
    if failed:
        names = ", ".join(check.name for check in failed)
        said.insert(0, f"Not to be trusted ({names}).")
        said.append("What attacks did reach stands; the model may be weaker than these numbers.")
    reasons = [f"{check.name}: {check.detail}. {check.explanation} {check.remedy}".rstrip() for check in failed]
    return Verdict(trusted=not failed, summary=" ".join(filter(None, said)), reasons=reasons)


def _worst(point: Universal, transfer: Sequence[Transferred]) -> tuple[Rate, Transferred | None]:
    """The highest error that one pattern reached at this eps, and where it came from if it was not crafted here."""
    others = [one for one in transfer if one.universal and (one.eps, one.norm) == (point.eps, point.norm)]
    best = max(others, key=lambda one: one.error.value, default=None)
    if best is not None and best.error.value > point.uer.value:
        return best.error, best
    return point.uer, None


def _one_pattern(clean: Rate, point: Universal, delta: float, transfer: Sequence[Transferred]) -> str:
    worst, source = _worst(point, transfer)
    share = f"{100 * delta:g} %"
    if clean.complement.low >= delta:
        lead = f"At an error of {share} before any pattern is added; under one"
    elif worst.low >= delta:
        lead = "Broken by one pattern"
    elif worst.high < delta:
        lead = f"Not brought to an error of {share} by one pattern"
    else:
        lead = f"On the edge of an error of {share} under one pattern"
    subject = "it misclassifies"
    against = f"{clean.complement} when clean"
    if source is not None:
        subject = f"the one of {source.source} misclassifies"
        against = f"{point.uer} under the one crafted on the model itself, {against}"
    if point.controls:
        rival = max(point.controls, key=lambda control: control.worst.value)
        against += f" and {rival.worst} under the strongest control ({rival.name})"
    return f"{lead} at eps {point.eps:.3g}: {subject} {worst} of test images, against {against}."


def _image_by_image(point: Universal, per_image: Sequence[PerImage], transfer: Sequence[Transferred]) -> str:
    at = (point.eps, point.norm)
    found = [(one.accuracy, one.attack) for one in per_image if (one.eps, one.norm) == at]
    found += [
        (one.error.complement, f"{one.attack} on {one.source}")
        for one in transfer
        if not one.universal and (one.eps, one.norm) == at
    ]
    if not found:
        return ""
    attack = min(found, key=lambda entry: entry[0].value)[1]
    accuracy = Rate.lowest(rate for rate, _ in found)
    return f"Attacked image by image, {accuracy} stay right under the worst attack ({attack})."


def _random(subject: Subject | None, draws: Draws | None) -> str:
    if draws is None:
        return "The model is random." if subject is not None and subject.random else ""
    if draws.draws == 1:
        return "The model is random, and one pass decided every image."
    quiet = f"; with its noise off it gets {draws.noise_off}" if draws.noise_off is not None else ""
    return (
        f"The model is random: the majority of {draws.draws} passes decides an image, and a single pass gets "
        f"{100 * draws.mean:.1f} % ± {100 * draws.spread:.1f} of the clean ones{quiet}."
    )


def _eps_uni(found: EpsUni) -> str:
    bound = f"more than {found.value:.3g}" if found.censored else f"at most {found.value:.3g}"
    return f"eps_uni({found.delta:g}) is {bound}."
