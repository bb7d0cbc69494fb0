"""Steadiness: whether a gradient depends on the batch it is taken in, or on the call."""

from __future__ import annotations

from math import inf, sqrt
from statistics import NormalDist

import torch

from gambeson.attacks import Loss
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.outcome import LEVEL, clearly_more
from gambeson.auditing.results import Steadiness
from gambeson.base import generator, seeded
from gambeson.evaluation.outcome import at_once
from gambeson.threat import Ball, Norm, perturb

_PROBES = 16
DRAWN = 3
"""Sizes of batches that are drawn at random."""
_CALLS = 12
_ONE = "one by one"
FALSE = 0.05
"""Share of images whose gradient may differ (ours): at a kink of the loss, rounding decides between two."""
_ALIKE = 0.9
"""Least cosine of two gradients that are one; their lengths may differ by a factor of two (ours)."""
_DUAL: dict[Norm, float] = {"inf": 1, "2": 2, "1": inf}
_ROUNDED = torch.finfo(torch.float32).eps
_BLURRED = 0.1
"""What the cosine of a random model's gradients may lose from one batch to another (ours)."""


def _points(context: AuditContext) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = context.few(_PROBES, context.sample).take(slice(None), context.victim.device)
    draw = generator(context.seed, "gradients", device=images.device)
    return perturb(images, Ball(eps=context.eps, norm=context.suite.norm).uniform(images.shape, draw)), labels


def _gradient(context: AuditContext, images: torch.Tensor, labels: torch.Tensor, *, original: bool) -> torch.Tensor:
    """Return the gradients (N, C, H, W) of the margin, as attacks take them or by the model itself.

    One that promises less over the whole ball than the best two logits are rounded by is zero: it is rounding itself.
    """
    victim, loss, suite = context.victim, Loss(kind="margin"), context.suite
    with torch.enable_grad():
        point = images.detach().clone().requires_grad_()
        logits = victim.forward_original(point) if original else victim(point)
        found = victim.gradient(loss(logits, labels, context.test.task).sum(), point, len(point)).detach()
    promise = context.eps * torch.linalg.vector_norm(found.flatten(1), ord=_DUAL[suite.norm], dim=1)
    best = logits.detach().topk(2, dim=1).values.flatten(1).abs().amax(1)
    return torch.where((promise <= _ROUNDED * best)[:, None, None, None], 0.0, found)


def _sizes(context: AuditContext) -> list[int]:
    """Sizes of batches that gradients are taken on: of attacks, some below, and some drawn between.

    Attacks drop images that are adversarial already, so that their batches have any size up to the largest.
    """
    suite, most = context.suite, at_once(context.test)
    drawn = torch.randint(1, most + 1, (DRAWN,), generator=generator(context.seed, "sizes")).tolist()
    sizes = (7, 32, suite.universal_batch, 100, min(suite.sample, most), most, *drawn)
    return sorted({min(most, size) for size in sizes})


def _filled(size: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """Return which of ``count`` images stand where in a batch of ``size``: in random order, repeated to fill it."""
    return torch.randperm(count, generator=draw).repeat(-(-size // count))[: max(size, count)]


def begin(context: AuditContext, stages: Checkpoints) -> None:
    """Compare gradients before any attack; where those of large batches are false, attacks keep to smaller ones."""
    if context.subject.black_box:
        return
    if not context.subject.random:
        before = context.spent
        with context.unscaled():
            context.gradients, _ = _alone(context)
        stages.charge("first gradients", context.since(before))
    context.steadiness = stages.do("gradients", Steadiness, lambda: measure(context))
    context.victim.most = context.steadiness.most


def measure(context: AuditContext) -> Steadiness:
    """Compare the gradients of the same images in batches of the sizes of attacks, in other orders, call after call."""
    with context.unscaled():
        return _random_gradients(context) if context.subject.random else _gradients(context)


def _alone(context: AuditContext) -> tuple[torch.Tensor, str]:
    """Return the gradients by the model itself, of one image at a time, and how they were taken in words."""
    images, labels = _points(context)
    parts = [slice(k, k + 1) for k in range(len(images))]
    try:
        found = [_gradient(context, images[part], labels[part], original=True) for part in parts]
    except Exception:  # made for one size of batch; statistics of a single image
        return _gradient(context, images, labels, original=True), f"in a batch of {len(images)}"
    return torch.cat(found), _ONE


def changed_since(context: AuditContext) -> int | None:
    """Return of how many images the gradient is another than at the beginning; None where nothing was kept."""
    if context.gradients is None:
        return None
    with context.unscaled():
        return int((~_same(context.gradients, _alone(context)[0])).sum())


def _gradients(context: AuditContext) -> Steadiness:
    images, labels = _points(context)
    count, draw = len(images), generator(context.seed, "order")
    reference, name = _alone(context)
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
    false = {title: clearly_more(bad, count, FALSE) for title, bad in differing.items()}
    wrong = [size for title, size, calls in makeups if calls == 1 and false.get(title)]
    right = [size for size in _sizes(context) if wrong and size < min(wrong)]
    return Steadiness(
        passed=not any(false.values()),
        images=count,
        most=max(right, default=None) if name == _ONE else None,
        detail=f"of the gradients of {count} images taken {name}, at most {differing[worst]} are others when taken "
        f"again, {worst}",
        numbers={"differing": differing[worst] / count},
    )


def _same(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return which gradients are one and the same (N,): in direction, and about in length; or both zero."""
    # One that is not finite is as useless to an attack as zero, and another check's affair.
    one, other = (part.double().flatten(1).nan_to_num(0, 0, 0) for part in (first, second))
    lengths = one.norm(dim=1), other.norm(dim=1)
    near = (lengths[0] <= 2 * lengths[1]) & (lengths[1] <= 2 * lengths[0])
    return (_cosines(one, other) > _ALIKE) & near | ((lengths[0] == 0) & (lengths[1] == 0))


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # Scaled first: the square of a gradient that is nearly zero underflows.
    units = [part / part.abs().amax(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny) for part in (one, other)]
    return torch.cosine_similarity(units[0], units[1])


def _random_gradients(context: AuditContext) -> Steadiness:
    """Compare means over draws: between two batches of one size, and between batches of two sizes."""
    images, labels = _points(context)
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
    return Steadiness(
        passed=passed,
        images=count,
        detail=f"gradients of {count} images, each a mean over {context.suite.eot_samples} draws, have a cosine of "
        f"{numbers['within']:.2f} between two batches of {count}, and one lower by {lost:.2f} at the most between "
        f"batches of different sizes, up to {most}",
        numbers={**numbers, "lost": lost},
    )
