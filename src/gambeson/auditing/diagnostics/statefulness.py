"""Answers that depend on more than the image: on the rest of its batch, or on what was asked before."""

from __future__ import annotations

import copy

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.base import generator, seeded
from gambeson.victim import Victim, predict

_PROBES = 8
_OTHERS = 24
_BURST = 120
_REPEATS = 10
_NEAR = 1 / 255
_NOISE = 0.01
"""What rounding may do: batches of another size are added up in another order."""
_TIMES = 6
"""How often a random model must do the same again: one that draws among few answers does so once or twice by chance."""
_UNREPEATABLE = Finding(
    None, "the model is random and no seed of torch makes it repeat itself: its answers cannot be told from its noise"
)

_STATEFUL = Finding(
    False,
    "asked twice for the same images from the same seed, the model answers differently; copies of it answer alike "
    "after the same images and otherwise after others: it remembers what it was asked",
)


def _asked(context: AuditContext, images: torch.Tensor) -> torch.Tensor:
    """Return logits, a random model's all from the same draw; another draws from wherever the generators stand."""
    with torch.no_grad():
        if not context.subject.random:
            return context.victim.forward_original(images)
        with seeded(context.seed, "state"):
            return context.victim.forward_original(images)


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two answers, as a share of the range of the first."""
    size = (first.max() - first.min()).clamp(min=torch.finfo(first.dtype).tiny)
    return float(((first - second).abs().max() / size).nan_to_num(torch.inf, torch.inf))


def _repeats(context: AuditContext, images: torch.Tensor) -> bool:
    first = _asked(context, images)
    return all(_apart(first, _asked(context, images)) <= _NOISE for _ in range(_TIMES))


def _remembers(context: AuditContext, images: torch.Tensor) -> bool:
    """Whether copies of the model answer alike after the same images, and otherwise after others.

    A model that draws from a generator of its own also moves from call to call, but whatever the images were.
    """
    if context.subject.black_box:
        return False
    answers = []
    try:
        for before in (*[images] * _TIMES, 1 - images):
            with Victim(copy.deepcopy(context.victim.model)) as twin, seeded(context.seed, "state"), torch.no_grad():
                twin.forward_original(before.clone())
                answers.append(twin.forward_original(images.clone()))
    except Exception:  # what cannot be copied cannot be told
        return False
    first, *again, other = answers
    return max(_apart(first, one) for one in again) <= _NOISE < _apart(first, other)


@register(
    "independent of the batch",
    condition="the logits of an image change with the other images of its batch",
    explanation="An image's answer is not its own: statistics or attention reach across the batch, so that a rate "
    "depends on how images were put together, and an attack changes the answers of images it does not touch.",
    remedy="Put BatchNorm in evaluation mode, with running statistics; let nothing reach across the batch.",
    gradients=False,
)
def _batches(context: AuditContext) -> Finding:
    images, _ = context.few(_PROBES + _OTHERS, context.sample).take(slice(None), context.victim.device)
    probes, others = images[:_PROBES], images[_PROBES:]
    if context.subject.random and not _repeats(context, images):
        return _UNREPEATABLE
    beside = torch.cat([probes, others])
    # Flat images, half of them black: statistics of this batch are far from those of the other.
    flat = torch.linspace(-1, 1, len(others), device=images.device).clamp(min=0).view(-1, 1, 1, 1).expand_as(others)
    reference = _asked(context, beside)[: len(probes)]
    gap = _apart(reference, _asked(context, torch.cat([probes, flat]))[: len(probes)])
    alone = None
    if not context.subject.random:  # alone, a random model's noise falls on other values
        try:
            alone = _apart(reference, torch.cat([_asked(context, probe[None]) for probe in probes]))
        except Exception:  # a program that was exported for one batch size; statistics of a single image
            alone = None
    said = (
        "they cannot be asked for one by one"
        if alone is None
        else f"asked for one by one they differ by {100 * alone:.2g} %"
    )
    if context.subject.random:
        said = "both at one draw"
    worst = max(gap, alone or 0.0)
    return Finding(
        worst <= _NOISE,
        f"between two batches the logits of {len(probes)} images differ by {100 * gap:.2g} % of their range; {said}",
        {"between_batches": gap, **({} if alone is None else {"alone": alone})},
    )


def _moves(context: AuditContext, image: torch.Tensor) -> bool:
    """Whether the largest logit has a gradient at an image."""
    with torch.enable_grad():
        point = image.clone().requires_grad_()
        return bool(context.victim.gradient(context.victim.forward_original(point).amax(), point, 1).any())


@register(
    "stateless",
    condition="the same images get other answers later, or after many queries near one of them; or all images near "
    "another get the logits of that one to the last digit",
    explanation="The model keeps a state between calls, as detectors of repeated queries do (Chen, Carlini and "
    "Wagner 2019): what looks like robustness is its memory of the attack.",
    remedy="Reset the model before each call, or audit the network behind the detector.",
    gradients=False,
)
def _memory(context: AuditContext) -> Finding:
    victim, subject = context.victim, context.subject
    images, _ = context.few(_PROBES, context.sample).take(slice(None), victim.device)
    if subject.random and not _repeats(context, images):
        return _STATEFUL if _remembers(context, images) else _UNREPEATABLE
    # The whole split again where the model is random: with other batches it would not draw the same.
    count = len(context.test) if subject.random else min(context.suite.sample, len(context.test))
    rows = context.test.sample_indices(count, seed=context.seed)
    again = predict(victim, context.test.subset(rows))
    changed = float((again != context.predictions[rows]).float().mean())
    before = _asked(context, images)
    draw = generator(context.seed, "burst")
    asked, gap, same = images[:1], 0.0, 0
    # Looked at on an image that nobody has asked for yet: what is replayed need not have the gradient it had.
    moves = not subject.black_box and _moves(context, images[:2].mean(0, keepdim=True))
    alone = _asked(context, asked)
    for number in range(_BURST):
        if number % _REPEATS:
            noise = torch.rand(asked.shape, generator=draw).to(asked) * 2 - 1
            same += torch.equal(_asked(context, (asked + _NEAR * noise).clamp(0, 1)), alone)
        else:
            gap = max(gap, _apart(alone, _asked(context, asked)))
    gap = max(gap, _apart(alone, _asked(context, asked)))
    after = _apart(before, _asked(context, images))
    # What has a gradient moves with its image; labels, rounded logits and the like need not.
    replayed = moves and same == _BURST - _BURST // _REPEATS
    return Finding(
        changed <= _NOISE and max(gap, after) <= _NOISE and not replayed,
        f"{100 * changed:.2g} % of the clean predictions differ from those at the audit's beginning; while {_BURST} "
        f"queries near one image were asked, its logits changed by {100 * gap:.2g} % of their range, and those of "
        f"{len(images)} images by {100 * after:.2g} %; {same} of the queries got its logits to the last digit",
        {"changed": changed, "repeated": gap, "probes": after, "same": same / _BURST},
    )


@register(
    "input unchanged",
    condition="never: a model that writes into its input is given copies, and this check says so",
    explanation="Writing into the images would change what an attack keeps.",
    remedy="Copy the images at the start of the model's forward.",
    gradients=False,
)
def _input(context: AuditContext) -> Finding:
    traits = context.victim.traits
    if traits is not None and traits.writes:
        return Finding(True, "the model writes into the images it is given; every number was taken with copies")
    return Finding(True, "the images come back as they were sent")
