"""Answers and gradients asked for once more: in other batches, at other times, and inside the ball."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import sqrt
from statistics import NormalDist

import torch

from gambeson.attacks import Loss
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.diagnostics.gradient_masking import probe
from gambeson.auditing.outcome import LEVEL, PairedDifference
from gambeson.auditing.rescoring import SHRINK, Perturbed, clearly_more, rescored_in, ways
from gambeson.auditing.results import Rescored
from gambeson.auditing.stages.per_image import PGD_NAME
from gambeson.base import generator, seeded
from gambeson.evaluation.outcome import at_once, outcome
from gambeson.tasks import Counts
from gambeson.threat import Ball, perturb
from gambeson.victim import score

_PROBES = 16
_CALLS = 12
_FALSE = 0.05
"""Share of images whose gradient may differ (ours): at a kink of the loss, rounding decides between two."""
_ALIKE = 0.9
"""Least cosine of two gradients that are one; their lengths may differ by a factor of two (ours)."""
_BLURRED = 0.1
"""What the cosine of a random model's gradients may lose from one batch to another (ours)."""
_AGAIN = 64
_AGAIN_BATCH = 16


def _listed(found: Iterable[tuple[str, Rescored]]) -> str:
    said = [
        f"{what} {one.way}: {100 * one.right:.1f} % right, reported {100 * one.reported:.1f} % of {one.images}"
        for what, one in found
    ]
    return "; ".join(said)


def _stored(context: AuditContext) -> Iterator[tuple[str, Rescored]]:
    """What stages found where they asked again for the images that they had perturbed."""
    for point in context.universal:
        yield from ((f"under the pattern of eps {point.eps:.4g}", one) for one in point.rescored)
    for attack in context.per_image:
        yield from ((f"under {attack.attack}", one) for one in attack.rescored)


def _judged(found: list[tuple[str, Rescored]]) -> tuple[bool, str, dict[str, float]]:
    differing = [(what, one) for what, one in found if one.differs]
    most = max(found, key=lambda entry: abs(entry[1].right - entry[1].reported))
    detail = _listed(differing or [most])
    if not differing:
        detail = f"asked again {len(found)} times, no difference is clear; the largest is {detail}"
    worst = max((one.reported - one.right for _, one in found), default=0.0)
    return not differing, detail, {"largest loss": worst, "differing": len(differing) / len(found)}


@register(
    "alike in every batch",
    condition="images, clean or perturbed, are clearly more or less often right in batches of another size, order or "
    "make-up than in those that rates were taken on",
    explanation="An answer is the batch's and not the image's, so that a rate depends on how images were put together. "
    "The worst of the rates is the one reported.",
    remedy="Let nothing reach across the batch and nothing depend on its size; asked for one by one, a model has one "
    "answer.",
    gradients=False,
)
def _alike(context: AuditContext) -> Finding:
    batches = {way.name for way in ways(context, clean=True)}
    clean = Perturbed(split=context.test, right=score(context.predictions, context.test).counts)
    found = [("clean,", one) for one in rescored_in(context, clean, ways(context, clean=True))]
    found += [(what, one) for what, one in _stored(context) if one.way in batches]
    if not found:
        return Finding(None, "the model takes batches of one size alone")
    return Finding(*_judged(found))


@register(
    "no weaker inside the ball",
    condition=f"perturbed images are clearly more often wrong once changes are made smaller at random or rounded; or "
    f"PGD that keeps up to {100 * SHRINK:g} % off the surface of the ball breaks clearly more",
    explanation="What looks like robustness holds at the corners of the ball only, where attacks end: a perturbation "
    "inside is as allowed. The worst of the rates is the one reported.",
    remedy="Attack with changes of unequal size (PGD's shrink); find what rounds, counts or compares pixels.",
    gradients=False,
)
def _inside(context: AuditContext) -> Finding:
    batches = {way.name for way in ways(context, clean=True)}
    found = [(what, one) for what, one in _stored(context) if one.way not in batches]
    passed, detail, numbers = _judged(found) if found else (True, "", {})
    if context.suite.norm == "inf" and not context.subject.black_box:
        usual = probe(context, context.eps)
        within = usual.model_copy(update={"shrink": SHRINK})
        gain = PairedDifference.of(context.outcome(usual), context.outcome(within))
        passed = passed and gain.low <= 0
        said = f"PGD that keeps off the surface leaves {context.accuracy(within)} right, and breaks {gain.beyond()}"
        detail, numbers = "; ".join(filter(None, [detail, said])), numbers | {"gain": gain.value}
    return Finding(passed if detail else None, detail or "no perturbed images were asked for again", numbers)


@register(
    "gradient independent of the batch",
    condition="the gradient of the same images changes with the size or order of their batch, or from call to call",
    explanation="Attacks follow a gradient that is false in batches of their size, or during some of their calls: "
    "what they left right is no sign of robustness.",
    remedy="Let the model compute the same whatever it is called with before and beside; attack it one by one.",
)
def _steady(context: AuditContext) -> Finding:
    with context.unscaled():
        return _random_gradients(context) if context.subject.random else _gradients(context)


def _points(context: AuditContext, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = context.few(count, context.sample).take(slice(None), context.victim.device)
    draw = generator(context.seed, "gradients", device=images.device)
    return perturb(images, Ball(eps=context.eps, norm=context.suite.norm).uniform(images.shape, draw)), labels


def _gradient(context: AuditContext, images: torch.Tensor, labels: torch.Tensor, *, original: bool) -> torch.Tensor:
    """Return the gradients (N, C, H, W) of the margin, as attacks take them or by the model itself."""
    victim, loss = context.victim, Loss(kind="margin")
    with torch.enable_grad():
        point = images.detach().clone().requires_grad_()
        logits = victim.forward_original(point) if original else victim(point)
        return victim.gradient(loss(logits, labels, context.test.task).sum(), point, len(point)).detach()


def _sizes(context: AuditContext) -> list[int]:
    """Sizes of batches that gradients are taken on: of attacks, and some below and between."""
    most = at_once(context.test)
    suite = context.suite
    return sorted({min(most, size) for size in (7, 32, suite.universal_batch, 100, min(suite.sample, most), most)})


def _filled(size: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """Return which of ``count`` images stand where in a batch of ``size``: in random order, repeated to fill it."""
    return torch.randperm(count, generator=draw).repeat(-(-size // count))[: max(size, count)]


def _gradients(context: AuditContext) -> Finding:
    images, labels = _points(context, _PROBES)
    count, draw = len(images), generator(context.seed, "order")

    def alone(k: int) -> torch.Tensor:
        return _gradient(context, images[k : k + 1], labels[k : k + 1], original=True)

    try:
        reference, name = torch.cat([alone(k) for k in range(count)]), "one by one"
    except Exception:  # made for one size of batch; statistics of a single image
        reference, name = _gradient(context, images, labels, original=True), f"in a batch of {count}"
    differing: dict[str, int] = {}
    makeups: list[tuple[str, int, int]] = [(f"in a batch of {size}", size, 1) for size in _sizes(context)]
    makeups.append((f"in some of {_CALLS} calls", count, _CALLS))
    for title, size, calls in makeups:
        bad = torch.zeros(count, dtype=torch.bool)
        for _ in range(calls):
            order = torch.arange(count) if size < count else _filled(size, count, draw)
            try:
                parts = order.split(size)
                found = torch.cat([_gradient(context, images[k], labels[k], original=False) for k in parts])
            except Exception:  # made for another size of batch
                break
            bad[order[~_same(reference[order], found).cpu()]] = True
        differing[title] = int(bad.sum())
    worst = max(differing, key=differing.__getitem__)
    return Finding(
        not any(clearly_more(bad, count, _FALSE) for bad in differing.values()),
        f"of the gradients of {count} images taken {name}, at most {differing[worst]} are others when taken again, "
        f"{worst}",
        {"differing": differing[worst] / count},
    )


def _same(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return which gradients are one and the same (N,): in direction, and about in length; or both zero."""
    one, other = first.double().flatten(1), second.double().flatten(1)
    lengths = one.norm(dim=1), other.norm(dim=1)
    near = (lengths[0] <= 2 * lengths[1]) & (lengths[1] <= 2 * lengths[0])
    return (_cosines(one, other) > _ALIKE) & near | ((lengths[0] == 0) & (lengths[1] == 0))


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # Scaled first: the square of a gradient that is nearly zero underflows.
    units = [part / part.abs().amax(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny) for part in (one, other)]
    return torch.cosine_similarity(units[0], units[1])


def _random_gradients(context: AuditContext) -> Finding:
    """Compare means over draws: between two batches of one size, and between batches of two sizes."""
    images, labels = _points(context, _PROBES)
    count, most = len(images), at_once(context.test)

    def mean(size: int, name: str) -> torch.Tensor:
        total = torch.zeros_like(images)
        order = _filled(size, count, generator(context.seed, "order", size))
        with seeded(context.seed, "gradients", name):
            for _ in range(context.suite.eot_samples):
                found = _gradient(context, images[order], labels[order], original=False)
                total[order[:count]] += found[:count]
        return total.double().flatten(1)

    first, second = mean(count, "first"), mean(count, "second")
    within = _cosines(first, second)
    clear = NormalDist().inv_cdf(1 - LEVEL)
    numbers, passed, lost = {"within": float(within.mean())}, True, 0.0
    for size in (32, most):
        loss = within - _cosines(first, mean(max(size, count), f"size {size}"))
        error = float(loss.std()) / sqrt(max(1, count))
        passed = passed and not float(loss.mean()) - clear * error > _BLURRED
        lost = max(lost, float(loss.mean()))
    return Finding(
        passed,
        f"gradients of {count} images, each a mean over {context.suite.eot_samples} draws, have a cosine of "
        f"{numbers['within']:.2f} between two batches of {count}, and one lower by {lost:.2f} at the most between "
        f"batches of different sizes, up to {most}",
        {**numbers, "lost": lost},
    )


@register(
    "attack repeats its outcome",
    condition="the same attack, repeated at the end of the audit in small batches, breaks clearly more images",
    explanation="The attack was hindered when the reported number was taken: by the size of its batches, or for a "
    "time.",
    remedy="Find what counts calls or images; attack in small batches and repeat.",
)
def _again(context: AuditContext) -> Finding:
    kept = context.outcomes.of(f"per_image:{PGD_NAME}")
    if kept is None:
        return Finding(None, "which images PGD left right was not kept")
    rows = context.test.sample_indices(min(_AGAIN, context.suite.sample), seed=context.seed)
    before = Counts(kept[1].right[rows], kept[1].total[rows])
    attack = context.averaged(context.suite.pgd(context.eps).model_copy(update={"restarts": 1}))
    again = outcome(context.victim, context.test.subset(rows), attack, context.seed, batch_size=_AGAIN_BATCH)
    gain = PairedDifference.of(before, again)
    return Finding(
        gain.low <= 0,
        f"PGD left {before.accuracy} right, and {again.accuracy} of the same images when repeated in batches of "
        f"{_AGAIN_BATCH}: that breaks {gain.beyond()}",
        {"before": before.accuracy.value, "again": again.accuracy.value},
    )
