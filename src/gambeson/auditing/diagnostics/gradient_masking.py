"""Gradient masking: gradients that vanish, saturate or differ from finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gambeson.analysis import GradientStatistics, gradient_statistics
from gambeson.attacks import PGD, Loss
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.base import UserError, generator, seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.outcome import at_once
from gambeson.tasks import Task
from gambeson.threat import Ball, norm_of_ones, perturb

_DEAD = 0.1
_STARVED = 0.05
_FALSE = 0.25
_REACH = 1e-3
"""Length of a difference, in pixel units: a quarter of a grey level."""
_FURTHER = 8
"""Part of eps, as a divisor, that a second difference takes: a quantised network is flat below its resolution, and a
little noise is larger than what the first changes (ours)."""
_PROMISE, _FEWEST = 0.5, 32
"""Of the median margin, what a difference may promise, so that it does not measure how far a function of very many
pixels is from its tangent: in more pixels than promise so much, no fewer than 32, none is moved (ours)."""
_LEAST = torch.finfo(torch.float32).tiny
"""What lies below is no longer a normal number: the gradient has underflown."""
_STEPS = 20
_DRAWS = 4
"""Of noise at each image (ours)."""
_SEVERAL = 3
"""Classes from which on wrong ones are looked at: the logits of two may be a number and a zero."""


@register(
    "no vanishing gradients",
    condition=f"more than {100 * _DEAD:g} % of images have a loss gradient of zero, to float32's smallest normal "
    "number, or one that is not finite; or on as many no wrong class's logit has a gradient; or at as many pixels of "
    "label maps noise of eps changes no wrong class's logit",
    explanation="Such images cannot be attacked by following the gradient: it is saturated, detached, rounded away "
    "or lost to underflow; or it leads away from the right class, and towards no other.",
    remedy="Attack the logits before the part that hides it, or by queries.",
)
def _alive(context: AuditContext) -> Finding:
    split, loss = context.sample, Loss(kind="cross-entropy")
    scale = context.victim.temperature or 1.0  # of the logits that attacks see
    images, labels = split.take(slice(None), context.victim.device)
    dead = _without(_gradients(context, images, labels, lambda z, y: loss(z / scale, y, split.task))[0])
    detail = f"{dead} of {len(images)} images have an input gradient of zero, or one that is not finite"
    numbers, blind = {"dead": dead / len(images)}, 0
    if (split.task.labels_every_image or not split.task.per_image_label) and len(split.classes) >= _SEVERAL:
        blind = _without(_gradients(context, images, labels, lambda z, y: _of_wrong_classes(z, y, split.task))[0])
        detail += f"; on {blind} no wrong class's logit has a gradient"
        numbers["wrong classes dead"] = blind / len(images)
    alive = max(dead, blind) <= _DEAD * len(images)
    if not split.task.per_image_label and len(split.classes) >= _SEVERAL:
        still = _still(context, images, labels)
        detail += f"; at {100 * still:.1f} % of their pixels noise of eps changes no wrong class's logit"
        numbers["wrong classes still"] = still
        alive &= still <= _DEAD
    return Finding(alive, detail, numbers)


@torch.no_grad()
def _still(context: AuditContext, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of labelled pixels at which noise changes no wrong class's logit, so that none has a slope."""
    victim, task, size = context.victim, context.sample.task, at_once(context.sample)
    ball = Ball(eps=context.eps, norm=context.suite.norm)
    draw, still, labelled = generator(context.seed, "noise", device=images.device), 0, 0

    def logits(x: torch.Tensor) -> torch.Tensor:
        with seeded(context.seed, "one draw"):
            return victim.forward_original(x)

    for x, y in zip(images.split(size), labels.split(size), strict=True):
        before, counted = logits(x), task.valid(y)
        moved = torch.zeros_like(before, dtype=torch.bool)
        for _ in range(_DRAWS):
            moved |= logits(perturb(x, ball.signs(x.shape, draw))) != before
        moved = moved.scatter(1, task.indexable(y)[:, None], False).any(1)
        still, labelled = still + int((~moved & counted).sum()), labelled + int(counted.sum())
    return still / max(1, labelled)


def _without(gradients: torch.Tensor) -> int:
    """Return how many of the gradients (N, C, H, W) are zero or not finite."""
    largest = gradients.flatten(1).abs().amax(1)
    return int((~((largest >= _LEAST) & largest.isfinite())).sum())


def _of_wrong_classes(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
    # Weights of different size: gradients of different classes shall not cancel.
    weights = torch.linspace(1, 2, logits.shape[1], device=logits.device)
    weights = weights.view(-1, *[1] * (logits.ndim - 2)).expand_as(logits)
    return task.per_image((logits * weights.scatter(1, task.indexable(labels)[:, None], 0)).sum(1), labels)


@register(
    "margin loss no stronger",
    condition=f"PGD on the margin of the logits breaks clearly more images, by {100 * _STARVED:g} points, than PGD "
    "on cross-entropy with the same steps; of label maps on that of the pixels still right",
    explanation="The logits are so large, or so shaped, that the softmax starves the attack of its gradient "
    "(Carlini and Wagner 2017, section 5; Croce and Hein 2020, section 4); the universal perturbations were "
    "crafted on the same cross-entropy.",
    remedy="Attack the margin or the ratio of logits (loss='margin', loss='dlr'), which no factor changes.",
)
def _fed(context: AuditContext) -> Finding:
    usual = probe(context, context.eps)
    margin = usual.model_copy(update={"loss": "margin"})
    gain = context.compare(usual, margin, _STARVED)
    detail = (
        f"accuracy under PGD on cross-entropy {context.accuracy(usual)}, on the margin of the logits "
        f"{context.accuracy(margin)}: the latter breaks {gain.beyond(_STARVED)}"
    )
    numbers = {"cross-entropy": context.accuracy(usual).value, "margin": context.accuracy(margin).value}
    found = _statistics(context)
    if found is not None:
        detail += (
            f"; {100 * found.saturated:.0f} % of images are certain to the last digit, and on "
            f"{100 * found.masked_by_scale:.0f} % the loss has no gradient though the margin has one"
        )
        numbers |= {"saturated": found.saturated, "masked by scale": found.masked_by_scale}
        if found.rescaled_ratio is not None:
            numbers["rescaled ratio"] = found.rescaled_ratio
    return Finding(gain.low <= _STARVED, detail, numbers)


def _statistics(context: AuditContext) -> GradientStatistics | None:
    try:
        return gradient_statistics(context.victim, context.sample)
    except UserError:  # label maps, or gradients that are not finite, which "no vanishing gradients" is for
        return None


@register(
    "gradient matches finite differences",
    condition=f"on clearly more than {100 * _FALSE:g} % of images the margin changes along the gradient by less "
    f"than half or more than twice what the gradient promises, over {_REACH:g} in every pixel and over eps / "
    f"{_FURTHER}; in fewer pixels, drawn at random, where all would promise more than half the median margin",
    explanation="The gradient is not that of the function: shattered, straight-through, rounded or reversed "
    "(Athalye et al. 2018, section 4.1).",
    remedy="Replace the part that breaks the gradient by a smooth one in the backward pass (BPDA), or attack by "
    "queries.",
)
def _true(context: AuditContext) -> Finding:
    victim, split = context.victim, context.sample
    images, labels = split.take(slice(None), victim.device)
    draw = generator(context.seed, "differences", device=images.device)
    # Where attacks begin: a point drawn in the ball has no ties, at which one-sided derivatives differ.
    point = perturb(images, Ball(eps=context.eps, norm=context.suite.norm).uniform(images.shape, draw))
    loss = Loss(kind="margin")
    gradients, before = _gradients(context, point, labels, lambda z, y: loss(z, y, split.task))
    signs = torch.where(gradients == 0, Ball(eps=1).signs(images.shape, draw), gradients.sign())

    @torch.no_grad()
    def margins(of: torch.Tensor) -> torch.Tensor:
        found = []
        for x, y in zip(of.split(at_once(split)), labels.split(at_once(split)), strict=True):
            with seeded(context.seed, "one draw"):  # as the gradients: a difference of two draws is noise
                found.append(loss(victim.forward_original(x), y, split.task))
        return torch.cat(found)

    order = torch.rand(signs.shape, generator=draw, device=signs.device).flatten(1).argsort(1).argsort(1).view_as(signs)
    noise = before.double().new_zeros(())
    if victim.traits is not None and victim.traits.varies:  # what no seed of torch fixes
        noise = 3 * (margins(point) - before).double().abs().max()
    values = math.prod(split.shape)
    reaches = _REACH, max(_REACH, context.eps / norm_of_ones(context.suite.norm, split.shape) / _FURTHER)
    kept, told = (torch.zeros(len(images), dtype=torch.bool, device=images.device) for _ in range(2))
    for reach in reaches:
        moved = perturb(point, reach * signs)
        said = (gradients * (moved - point)).double().flatten(1).sum(1)
        most = _PROMISE * before.double().abs().nanmedian()
        part = torch.where((said.abs() > most) & (most > 0), most / said.abs(), 1.0).clamp(min=_FEWEST / values)
        moved = torch.where(order < (part * values).view(-1, *[1] * (signs.ndim - 1)), moved, point)
        said = (gradients * (moved - point)).double().flatten(1).sum(1)
        seen = (margins(moved) - before).double()
        clear = (said.abs().maximum(seen.abs()) > 2 * noise) | (noise == 0)
        true = ((seen >= said / 2 - noise) & (seen <= 2 * said + noise)) | ((seen == 0) & (said == 0))
        kept, told = kept | (true & clear), told | clear
    if 2 * int(told.sum()) < len(told):
        return Finding(None, f"noise that no seed fixes is larger than what a step of {reaches[1]:.2g} changes")
    false = Rate.of(int((~kept & told).sum()), int(told.sum()))
    return Finding(
        false.low <= _FALSE,
        f"on {false} of images steps of {reaches[0]:g} and {reaches[1]:.2g} along the gradient change the margin by "
        "less than half or more than twice what the gradient promises",
        {"false": false.value},
    )


def probe(context: AuditContext, eps: float) -> PGD:
    """The short PGD that comparisons at equal steps are made with."""
    steps = min(_STEPS, context.suite.pgd_steps)
    return context.pgd_at(eps).model_copy(update={"steps": steps, "restarts": 1})


def _gradients(
    context: AuditContext,
    images: torch.Tensor,
    labels: torch.Tensor,
    value_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (N, C, H, W), by the model itself, of a value of logits and labels, and the values (N,)."""
    victim, parts, size = context.victim, [], at_once(context.sample)
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        with torch.enable_grad(), seeded(context.seed, "one draw"):
            point = x.detach().clone().requires_grad_()
            value = value_of(victim.forward_original(point), y)
            parts.append((victim.gradient(value.sum(), point, len(point)), value.detach()))
    gradients, values = zip(*parts, strict=True)
    return torch.cat(gradients), torch.cat(values)
