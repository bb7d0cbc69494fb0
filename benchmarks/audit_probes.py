"""What a model answers and which gradients it has, measured for a picture of a diagnostic: :mod:`audit_measures`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from audit_panels import PERCENT, Panel, line_of
from torch.nn import functional as F

from gambeson.attacks import Loss
from gambeson.auditing import AuditContext, Finding
from gambeson.auditing.stages.randomness import one_pass
from gambeson.auditing.stages.universal import rescored
from gambeson.base import generator, seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.universal import accuracy_rate
from gambeson.threat import Ball, perturb
from gambeson.victim import predict, score

_SIZES = (1, 8, 32, 64, 128, 256)


def votes(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy of single passes over the clean test images, and what an audit of this suite reports."""
    values = []
    for number in range(21):
        with seeded(evidence.seed, "draw", number), one_pass(evidence.victim):
            values.append(accuracy_rate(score(predict(evidence.victim, evidence.test), evidence.test)))
    xs = list(range(1, 22))
    each = {"name": "one pass", "x": xs, "y": [100 * rate.value for rate in values], "apart": True}
    told = {"name": "reported", "x": [1, 21], "y": [100 * evidence.clean.value] * 2, "plain": True}
    return {
        "kind": "lines",
        "x": "pass over the same images",
        "y": "accuracy, %",
        "range": [80, 100],
        "lines": [each, told],
    }


def _asked(evidence: AuditContext, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return evidence.victim.forward_original(images).double()


def mates(evidence: AuditContext, found: Finding) -> Panel:
    """Logits of eight images beside other images and beside flat ones."""
    images, _ = evidence.sample.take(slice(0, 32), evidence.victim.device)
    flat = torch.linspace(-1, 1, 24).clamp(min=0).view(-1, 1, 1, 1).expand_as(images[8:])
    beside, other = _asked(evidence, images)[:8], _asked(evidence, torch.cat([images[:8], flat]))[:8]
    frame = [float(torch.stack([beside, other]).min()) - 1, float(torch.stack([beside, other]).max()) + 1]
    points = [{"x": beside.flatten().tolist(), "y": other.flatten().tolist()}]
    return {
        "kind": "points",
        "x": "logit beside other test images",
        "y": "logit beside flat images",
        "points": points,
        "frame": frame,
        "band": [1.0],
    }


def memory(evidence: AuditContext, found: Finding) -> Panel:
    """How far the logits of one image move while it and its neighbours are asked about."""
    image, draw = evidence.sample.take(slice(16, 17), evidence.victim.device)[0], generator(0, "picture")
    first = _asked(evidence, image)
    size = first.max() - first.min()
    xs, ys = [0], [0.0]
    for number in range(1, 121):
        if number % 10:
            noise = torch.rand(image.shape, generator=draw) * 2 - 1
            _asked(evidence, (image + noise / 255).clamp(0, 1))
        else:
            xs.append(number)
            ys.append(float(100 * (_asked(evidence, image) - first).abs().max() / size))
    line = {"name": "logits", "x": xs, "y": ys}
    words = {"x": "queries near one image", "y": "its logits moved,\n% of their range"}
    return {"kind": "lines", **words, "lines": [line], "limit": 1.0, "limit_says": "fails above"}


def _gradients(
    evidence: AuditContext, kind: Any, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    point = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = Loss(kind=kind)(evidence.victim.forward_original(point), labels)
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return gradient, value.detach()


def sizes(evidence: AuditContext, found: Finding) -> Panel:
    """How many images have a loss gradient of which size."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)
    largest = _gradients(evidence, "cross-entropy", images, labels)[0].flatten(1).abs().amax(1).double()
    power = largest.clamp(min=1e-99).log10()
    edges = (-99, -38, -6, -4, -2, 0, 99)
    names = ["0", "1e-6", "1e-4", "0.01", "1", "more"]
    counts = [int(((power >= low) & (power < high)).sum()) for low, high in pairwise(edges)]
    words = {"x": "largest entry of an image's loss gradient, up to", "y": "images", "range": [0, 1.12 * len(images)]}
    return {"kind": "columns", **words, "names": names, "counts": counts, "dead": 1}


def promises(evidence: AuditContext, found: Finding) -> Panel:
    """By how much the gradient says that a small step changes the margin, and by how much it does."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)
    draw = generator(evidence.seed, "differences")
    point = perturb(images, Ball(eps=evidence.eps).uniform(images.shape, draw))
    gradient, before = _gradients(evidence, "margin", point, labels)
    moved = perturb(point, 1e-3 * gradient.sign())
    said = (gradient * (moved - point)).double().flatten(1).sum(1)
    with torch.no_grad():
        seen = (Loss(kind="margin")(evidence.victim.forward_original(moved), labels) - before).double()
    reach = float(torch.cat([said, seen]).abs().max()) * 1.1
    return {
        "kind": "points",
        "x": "change of the margin that the gradient promises",
        "y": "change that is seen",
        "points": [{"x": said.tolist(), "y": seen.tolist()}],
        "frame": [0.0, reach],
        "height": [-reach, reach],
        "band": [0.5, 2.0],
    }


def again(evidence: AuditContext, found: Finding) -> Panel:
    """UER of one stored perturbation, scored several times."""
    uap, told = evidence.uaps[evidence.eps], 100 * found.numbers["reported"]
    values = [100 * rescored(evidence, uap) for _ in range(10)]
    lines = [
        {"name": "once more", "x": list(range(1, 11)), "y": values, "apart": True},
        {"name": "reported", "x": [1, 10], "y": [told, told], "plain": True},
    ]
    return {"kind": "lines", "x": "scored once more", "y": "UER, %", "lines": lines}


def batches(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under one perturbation against the size of the batches in which images are asked about."""
    images, labels = evidence.test.take(slice(None), evidence.victim.device)
    moved = perturb(images, evidence.uaps[evidence.eps].delta.expand_as(images))
    right = [torch.cat([_asked(evidence, x).argmax(1) for x in moved.split(size)]) == labels for size in _SIZES]
    rates = [Rate.of(int(one.sum()), len(one)) for one in right]
    words = {"x": "images in a batch", "log": True, "ticks": list(_SIZES), **PERCENT}
    return {"kind": "lines", **words, "lines": [line_of("under one perturbation", _SIZES, rates)]}


def agreement(evidence: AuditContext, found: Finding) -> Panel:
    """Images whose gradient is the same alone and in batches of growing size."""
    images, labels = evidence.sample.take(slice(0, 32), evidence.victim.device)
    alone = torch.cat(
        [_gradients(evidence, "margin", x, y)[0] for x, y in zip(images[:, None], labels[:, None], strict=True)]
    )
    rates = []
    for size in _SIZES:
        filled = (torch.arange(max(size, len(images))) % len(images)).to(images.device)
        parts = [_gradients(evidence, "margin", images[k], labels[k])[0] for k in filled.split(size)]
        cosine = F.cosine_similarity(torch.cat(parts)[: len(images)].flatten(1), alone.flatten(1))
        rates.append(Rate.of(int((cosine > 0.999).sum()), len(images)))
    words = {"x": "images in a batch", "log": True, "ticks": list(_SIZES), "y": "gradient as alone, % of images"}
    return {"kind": "lines", **words, "range": [-5, 105], "lines": [line_of("gradient", _SIZES, rates)]}


def random_steps(evidence: AuditContext, found: Finding) -> Panel:
    """By how much the gradient says that a step along random signs changes the margin, and by how much it does."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)
    draw = generator(evidence.seed, "picture")
    point = perturb(images, Ball(eps=evidence.eps).uniform(images.shape, draw)).clamp(0.01, 0.99)
    step = 1e-3 * (torch.randint(0, 2, images.shape, generator=draw) * 2 - 1)
    said = (_gradients(evidence, "margin", point, labels)[0] * 2 * step).double().flatten(1).sum(1)
    ends = [Loss(kind="margin")(_asked(evidence, point + way * step), labels) for way in (1, -1)]
    seen = ends[0] - ends[1]
    reach = float(torch.cat([said, seen]).abs().max()) * 1.1
    return {
        "kind": "points",
        "x": "change of the margin that the gradient promises",
        "y": "change that is seen",
        "points": [{"x": said.tolist(), "y": seen.tolist()}],
        "frame": [-reach, reach],
        "band": [1.0],
    }


def crossing(evidence: AuditContext, found: Finding) -> Panel:
    """Median over lines between images of the larger margin on the two sides of where the answer changes."""
    first, _ = evidence.sample.take(slice(None), evidence.victim.device)
    last = first.roll(1, 0)

    def at(share: torch.Tensor) -> torch.Tensor:
        return _asked(evidence, first + share.view(-1, 1, 1, 1) * (last - first))

    def margin(logits: torch.Tensor) -> torch.Tensor:
        best = logits.topk(2, 1).values
        return best[:, 0] - best[:, 1]

    start = _asked(evidence, first)
    lines = at(torch.ones(len(first))).argmax(1) != start.argmax(1)
    low, high = torch.zeros(len(first)), torch.ones(len(first))
    for _ in range(20):
        middle = (low + high) / 2
        changed = at(middle).argmax(1) != start.argmax(1)
        low, high = torch.where(changed, low, middle), torch.where(changed, middle, high)
    usual, gaps = margin(start).median(), [0.0, 0.01, 0.02, 0.04, 0.06, 0.08]
    sides = [[margin(at(place.clamp(0, 1)))[lines] for place in (low - gap, high + gap)] for gap in gaps]
    left = [float(100 * torch.maximum(*both).median() / usual) for both in sides]
    return {
        "kind": "lines",
        "x": "way from the place where the answer changes, % of the line",
        "y": "larger margin of both sides,\n% of the usual",
        "lines": [{"name": "margin", "x": [100 * gap for gap in gaps], "y": left}],
        "limit": 10.0,
        "limit_says": "fails above, at 0",
    }
