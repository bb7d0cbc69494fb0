"""White-box attacks must not be weaker than transfer, queries, noise or averaged gradients (Athalye et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gambeson.attacks import PGD, Noise, RayS, Square, UniversalPerturbation
from gambeson.auditing.boundary_gradient import BoundaryGradient
from gambeson.auditing.context import AuditContext, Where
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.nearest_class import NearestClass
from gambeson.auditing.outcome import AsFarAsFinite, PairedDifference
from gambeson.auditing.stages.transfer import FromSurrogate, image_attacks, on_surrogate
from gambeson.base import derive, eps_text, generator, seeded
from gambeson.data import Split
from gambeson.evaluation.attack_suite import WorstCase
from gambeson.evaluation.outcome import ImageAttack, at_once, outcome_under
from gambeson.tasks import Counts, Task
from gambeson.threat import Ball, perturb
from gambeson.victim import Victim

_MORE = 0.02
"""Share of images beyond which a weaker attack counts: honest networks come to a few in a thousand. Ours."""
_MORE_UNIVERSAL = 0.05
"""The same for universal perturbations, of which the best is found by luck as well."""
_QUERIES = 300
"""Maximum queries per image."""
_KNOWN, _FLOATS = 2000, 2**26
"""Training images that are stepped towards: so many at the most, and so many numbers in them."""
_MORE_BY_GRADIENTS = 0.01
"""The same for other gradients, which break at most one of 100 images of honest networks. Ours."""
_AVERAGED: dict[str, Any] = {"steps": 10, "noise": Noise(copies=16)}
"""Of the PGD along averaged gradients: few steps, and many copies (ours)."""
_RATIO = 3
"""Classes that a ratio of logits needs."""
_REMEDY = "Report the stronger attack's number, and find what stops the gradient; attack by transfer and queries."


@register(
    "white box beats transfer",
    condition="images perturbed on a surrogate are clearly more often wrong than under the strongest attack with "
    f"gradients on the model itself, by {100 * _MORE:g} points",
    explanation="The surrogate's gradient is a better guide than the model's own, which must be masked (Papernot et "
    "al. 2017; Tramèr et al. 2018, section 4: the white-box error less the transferred one fell to -9.7 points).",
    remedy=_REMEDY,
    comparisons=2,
    needs=("surrogate",),
)
def _transferred(context: AuditContext) -> Finding:
    if context.surrogate is None:
        return Finding(None, "there is no surrogate")
    white = context.white_box
    numbers, gains = {"white box": context.accuracy(white).value}, []
    for name, attack in image_attacks(context.eps, context.suite.norm, context.test.task).items():
        moved = FromSurrogate(context.surrogate, attack, context.surrogate_temperature, context.suite.eot_samples)
        gains.append(context.compare(white, moved, _MORE))
        numbers[name] = context.accuracy(moved).value
    rates = ", ".join(f"{name} {100 * value:.1f} %" for name, value in numbers.items() if name != "white box")
    return Finding(
        all(gain.low <= _MORE for gain in gains),
        f"accuracy at eps {eps_text(context.eps)} under {context.strongest} {context.accuracy(white)}; crafted on "
        f"the surrogate: {rates}; the strongest of these breaks {max(gains, key=lambda gain: gain.low).beyond(_MORE)}",
        numbers,
    )


@register(
    "universal white box beats transfer",
    condition="one perturbation crafted on a surrogate is clearly stronger than the one crafted on the model, by "
    f"{100 * _MORE_UNIVERSAL:g} points",
    explanation="The universal attack on the model itself missed a perturbation that exists.",
    remedy=_REMEDY,
    needs=("surrogate",),
)
def _universal(context: AuditContext) -> Finding:
    if context.surrogate is None:
        return Finding(None, "there is no surrogate")
    moved = on_surrogate(context, context.eps)
    if moved is None:
        return Finding(None, "there is no surrogate")
    return _against(context, moved, "the one crafted on the surrogate")


def _against(context: AuditContext, other: UniversalPerturbation, called: str) -> Finding:
    """Compare a perturbation with the one crafted on the model by gradients."""
    deltas = (context.crafted_at(context.eps).delta, other.delta)
    white, found = (outcome_under(context.victim, context.test, delta) for delta in deltas)
    gain = PairedDifference.of(white, found)
    return Finding(
        gain.low <= _MORE_UNIVERSAL,
        f"accuracy at eps {eps_text(context.eps)} under the perturbation crafted by gradients {white.accuracy}, under "
        f"{called} {found.accuracy}: the latter breaks {gain.beyond(_MORE_UNIVERSAL)}",
        {"white box": white.accuracy.value, "other": found.accuracy.value},
    )


@register(
    "universal white box beats queries",
    condition="one perturbation found by queries alone (universal NES) is clearly stronger than the one crafted by "
    f"gradients, by {100 * _MORE_UNIVERSAL:g} points",
    explanation="The universal attack with gradients missed a perturbation that exists, such as one behind a threshold "
    "that no gradient leads to.",
    remedy="Report the stronger perturbation's number, and find what stops the gradient; it may have been planted.",
    comparisons=1,
    needs=("universal_queries", "universal-nes"),
)
def _universal_queried(context: AuditContext) -> Finding:
    found = context.queried
    if found is None:
        return Finding(None, "no perturbation was crafted by queries alone")
    return _against(context, found, "the one found by queries alone")


@register(
    "white box beats queries",
    condition="Square, RayS, or steps towards training images of other classes, break clearly more than "
    f"{100 * _MORE:g} % of images among those that the strongest attack with gradients leaves right; of label maps, "
    "Square breaks so many of their pixels",
    explanation="An attack that sees scores alone finds what the gradient does not lead to (Athalye et al. 2018, "
    "section 3.1; Andriushchenko et al. 2020, section 5), and one that sees answers alone what scores do not lead to "
    "(RayS: Chen and Gu 2020); steps towards other images find what compares images with those it knows.",
    remedy=_REMEDY,
    needs=("queries",),
)
def _queried(context: AuditContext) -> Finding:
    norm, queries = context.suite.norm, min(_QUERIES, context.suite.queries)
    if norm == "1" or not queries:
        return Finding(None, "Square is for the norms inf and 2, and needs queries")
    square = Square(eps=context.eps, norm=norm, queries=queries)
    if not context.sample.task.per_image_label:
        return _queried_maps(context, square)
    rays = [RayS(eps=context.eps, queries=queries)] if norm == "inf" else []
    others: tuple[ImageAttack, ...] = (square, _towards(context), *rays)
    found: list[tuple[Counts, Counts, list[int]]] = []

    def counts(on: Where) -> tuple[Counts, Counts]:
        random = context.subject.random
        found.append(_voted(context, others, on) if random else context.beyond_white_box(others, on))
        return found[-1][:2]

    gain = context.compare_counts(counts, _MORE)
    white, both, broken = found[-1]
    left = int(white.right.sum())
    said = [f"{name} breaks {count}" for name, count in zip(("Square", "RayS"), (broken[0], *broken[2:]), strict=False)]
    return Finding(
        gain.low <= _MORE,
        f"of {left} images that {context.strongest} leaves right, among {len(white.right)}, {' and '.join(said)} "
        f"with {queries} queries each, and steps towards training images of other classes break {broken[1]}: together "
        f"{gain.beyond(_MORE)}",
        {"left by PGD": left, "broken by queries": left - int(both.right.sum())},
    )


@register(
    "other gradients no stronger",
    condition="PGD on the ratio of logits (DLR) or along gradients that are averaged over noise as large as eps, or "
    "steps along the boundary by the gradients on it, break clearly more than "
    f"{100 * _MORE_BY_GRADIENTS:g} % of images among those that the strongest attack with gradients leaves right",
    explanation="The gradient is true where it is taken and of no use a step further on: waves on the logits, or "
    "margins that shrink where the model is surer, turn every attack that follows it. A ratio of logits has no such "
    "scale (Croce and Hein 2020, section 4), averaged over noise a gradient is that of the function beneath (Wu et "
    "al. 2018), and where the answer changes no factor on the margin has a say (Brendel et al. 2019).",
    remedy="Report the stronger attack's number: gambeson.attacks.PGD with loss='dlr' or noise=Noise(), or start at "
    "images of other classes.",
)
def _other_gradients(context: AuditContext) -> Finding:
    if not context.sample.task.per_image_label:
        return Finding(None, "it is for one answer per image")
    if context.subject.random:
        return Finding(None, "the model is random, so that its gradients are averaged already")
    ball: dict[str, Any] = {"eps": context.eps, "norm": context.suite.norm}
    others = {f"averaged over {_AVERAGED['noise'].copies} noisy copies": PGD(**ball, **_AVERAGED)}
    if len(context.sample.classes) >= _RATIO:
        others = {"of the ratio of logits": PGD(**ball, loss="dlr")} | others
    attacks: dict[str, ImageAttack] = {name: AsFarAsFinite(one) for name, one in others.items()}
    attacks["taken where the answer changes"] = BoundaryGradient(Ball(**ball), _known(context))
    found: list[tuple[Counts, Counts, list[int]]] = []

    def counts(on: Where) -> tuple[Counts, Counts]:
        found.append(context.beyond_white_box([*attacks.values()], on))
        return found[-1][:2]

    gain = context.compare_counts(counts, _MORE_BY_GRADIENTS)
    white, both, broken = found[-1]
    left = int(white.right.sum())
    said = ", ".join(f"{name} {count}" for name, count in zip(attacks, broken, strict=True))
    return Finding(
        gain.low <= _MORE_BY_GRADIENTS,
        f"of {left} images that {context.strongest} leaves right, among {len(white.right)}, gradients break {said}: "
        f"together {gain.beyond(_MORE_BY_GRADIENTS)}",
        {"left by PGD": left, "broken by other gradients": left - int(both.right.sum())},
    )


def _queried_maps(context: AuditContext, square: Square) -> Finding:
    """Compare Square with PGD on label maps, which no class of another image could be stepped towards.

    The worse of the two per image is the model's, where it is not random: chance would choose then.
    """
    white, other = context.outcome(context.pgd), context.outcome(square)
    if not context.subject.random:
        other = Counts(white.right.minimum(other.right), other.total)
    gain = PairedDifference.of(white, other)
    return Finding(
        gain.low <= _MORE,
        f"of the pixels {white.accuracy} stand under PGD, and {other.accuracy} where Square with {square.queries} "
        f"queries per image does more: it breaks {gain.beyond(_MORE)}",
        {"left by PGD": white.accuracy.value, "left by queries": other.accuracy.value},
    )


def _voted(context: AuditContext, others: Sequence[ImageAttack], on: Where) -> tuple[Counts, Counts, list[int]]:
    """Do the same on a random model, where survivors that are judged once more fall by chance alone.

    The worst candidate of each image is chosen by some votes and scored on others, before the others and after them.
    """
    victim, sample, seed = context.victim, getattr(context, on), context.seed
    worst = WorstCase(victim, sample, seed=seed)
    clean, answers = worst.images.clone(), worst.counts.long().cpu()
    pgd = AsFarAsFinite(context.averaged(context.pgd))

    def attack(one: ImageAttack, rows: torch.Tensor, stream: int, source: int) -> None:
        moved = one(victim, clean[rows], worst.labels[rows], seed=stream, task=sample.task)
        worst.offer(rows, moved, source)

    with seeded(seed, "queried"):
        for k, rows in enumerate(torch.arange(len(sample), device=victim.device).split(at_once(sample))):
            attack(pgd, rows, derive(seed, "batch", k), 0)
        white, survivors = worst.right().cpu(), worst.survivors
        for k, one in enumerate(others if len(survivors) else (), 1):
            attack(one, survivors, seed, k)
        both = worst.right().cpu()
    broken = [int((white & ~both & (worst.source.cpu() == k)).sum()) for k in range(1, len(others) + 1)]
    return Counts(white.long(), answers), Counts(both.long(), answers), broken


def _towards(context: AuditContext) -> NearestClass:
    return NearestClass(Ball(eps=context.eps, norm=context.suite.norm), _known(context))


def _known(context: AuditContext) -> Split:
    train = context.data.train
    return context.few(min(_KNOWN, _FLOATS // torch.Size(train.shape).numel()), train)


class _Noise:
    """Random signs on the surface of the ball, drawn anew for every image."""

    def __init__(self, ball: Ball) -> None:
        self.ball = ball

    def __repr__(self) -> str:
        return f"Noise({self.ball})"

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        return perturb(x, self.ball.signs(x.shape, generator(seed, "noise", device=x.device)))


@register(
    "attack beats noise",
    condition=f"random signs of norm eps break clearly more images than PGD, by {100 * _MORE:g} points",
    explanation="Noise does more than the attack, which has no gradient to follow, or a misleading one.",
    remedy=_REMEDY,
)
def _noise(context: AuditContext) -> Finding:
    white = context.pgd
    noise = _Noise(white.ball)
    gain = context.compare(white, noise, _MORE)
    return Finding(
        gain.low <= _MORE,
        f"accuracy at eps {eps_text(context.eps)} under PGD {context.accuracy(white)}, under random signs drawn anew "
        f"for every image {context.accuracy(noise)}: the signs break {gain.beyond(_MORE)}",
        {"pgd": context.accuracy(white).value, "noise": context.accuracy(noise).value},
    )
