"""Answers that depend on more than the image: on the rest of its batch, or on what was asked before."""

from __future__ import annotations

import copy

import torch

from gambeson.auditing.context import Evidence
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


def _asked(evidence: Evidence, images: torch.Tensor) -> torch.Tensor:
    """Return logits, a random model's all from the same draw; another draws from wherever the generators stand."""
    with torch.no_grad():
        if not evidence.subject.random:
            return evidence.victim.exact(images)
        with seeded(evidence.seed, "state"):
            return evidence.victim.exact(images)


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two answers, as a share of the range of the first."""
    size = (first.max() - first.min()).clamp(min=torch.finfo(first.dtype).tiny)
    return float(((first - second).abs().max() / size).nan_to_num(torch.inf, torch.inf))


def _repeats(evidence: Evidence, images: torch.Tensor) -> bool:
    first = _asked(evidence, images)
    return all(_apart(first, _asked(evidence, images)) <= _NOISE for _ in range(_TIMES))


def _remembers(evidence: Evidence, images: torch.Tensor) -> bool:
    """Whether copies of the model answer alike after the same images, and otherwise after others.

    A model that draws from a generator of its own also moves from call to call, but whatever the images were.
    """
    if evidence.subject.black_box:
        return False
    answers = []
    try:
        for before in (*[images] * _TIMES, 1 - images):
            with Victim(copy.deepcopy(evidence.victim.model)) as twin, seeded(evidence.seed, "state"), torch.no_grad():
                twin.exact(before.clone())
                answers.append(twin.exact(images.clone()))
    except Exception:  # what cannot be copied cannot be told
        return False
    first, *again, other = answers
    return max(_apart(first, one) for one in again) <= _NOISE < _apart(first, other)


@register(
    "train-mode BatchNorm",
    condition="the logits of an image change with the other images of its batch",
    explanation="An image's answer is not its own: statistics or attention reach across the batch, so that a rate "
    "depends on how images were put together, and an attack changes the answers of images it does not touch.",
    remedy="Put BatchNorm in evaluation mode, with running statistics; let nothing reach across the batch.",
    gradients=False,
)
def _batches(evidence: Evidence) -> Finding:
    images, _ = evidence.few(_PROBES + _OTHERS, evidence.sample).take(slice(None), evidence.victim.device)
    probes, others = images[:_PROBES], images[_PROBES:]
    if evidence.subject.random and not _repeats(evidence, images):
        return _UNREPEATABLE
    beside = torch.cat([probes, others])
    # Flat images, half of them black: statistics of this batch are far from those of the other.
    flat = torch.linspace(-1, 1, len(others), device=images.device).clamp(min=0).view(-1, 1, 1, 1).expand_as(others)
    reference = _asked(evidence, beside)[: len(probes)]
    gap = _apart(reference, _asked(evidence, torch.cat([probes, flat]))[: len(probes)])
    alone = None
    if not evidence.subject.random:  # alone, a random model's noise falls on other values
        try:
            alone = _apart(reference, torch.cat([_asked(evidence, probe[None]) for probe in probes]))
        except Exception:  # a program that was exported for one batch size; statistics of a single image
            alone = None
    said = (
        "they cannot be asked for one by one"
        if alone is None
        else f"asked for one by one they differ by {100 * alone:.2g} %"
    )
    if evidence.subject.random:
        said = "both at one draw"
    worst = max(gap, alone or 0.0)
    return Finding(
        worst <= _NOISE,
        f"between two batches the logits of {len(probes)} images differ by {100 * gap:.2g} % of their range; {said}",
        {"between_batches": gap, **({} if alone is None else {"alone": alone})},
    )


def _moves(evidence: Evidence, image: torch.Tensor) -> bool:
    """Whether the largest logit has a gradient at an image."""
    with torch.enable_grad():
        point = image.clone().requires_grad_()
        return bool(evidence.victim.gradient(evidence.victim.exact(point).amax(), point, 1).any())


@register(
    "remembers queries",
    condition="the same images get other answers later, or after many queries near one of them; or all images near "
    "another get the logits of that one to the last digit",
    explanation="The model keeps a state between calls, as detectors of repeated queries do (Chen, Carlini and "
    "Wagner 2019): what looks like robustness is its memory of the attack.",
    remedy="Reset the model before each call, or audit the network behind the detector.",
    gradients=False,
)
def _memory(evidence: Evidence) -> Finding:
    victim, subject = evidence.victim, evidence.subject
    images, _ = evidence.few(_PROBES, evidence.sample).take(slice(None), victim.device)
    if subject.random and not _repeats(evidence, images):
        return _STATEFUL if _remembers(evidence, images) else _UNREPEATABLE
    # The whole split again where the model is random: with other batches it would not draw the same.
    count = len(evidence.test) if subject.random else min(evidence.suite.sample, len(evidence.test))
    rows = evidence.test.sample_indices(count, seed=evidence.seed)
    again = predict(victim, evidence.test.subset(rows))
    changed = float((again != evidence.predictions[rows]).float().mean())
    before = _asked(evidence, images)
    draw = generator(evidence.seed, "burst")
    asked, gap, same = images[:1], 0.0, 0
    # Looked at on an image that nobody has asked for yet: what is replayed need not have the gradient it had.
    moves = not subject.black_box and _moves(evidence, images[:2].mean(0, keepdim=True))
    alone = _asked(evidence, asked)
    for number in range(_BURST):
        if number % _REPEATS:
            noise = torch.rand(asked.shape, generator=draw).to(asked) * 2 - 1
            same += torch.equal(_asked(evidence, (asked + _NEAR * noise).clamp(0, 1)), alone)
        else:
            gap = max(gap, _apart(alone, _asked(evidence, asked)))
    gap = max(gap, _apart(alone, _asked(evidence, asked)))
    after = _apart(before, _asked(evidence, images))
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
    "keeps its input",
    condition="never: a model that writes into its input is given copies, and this check says so",
    explanation="Writing into the images would change what an attack keeps.",
    remedy="Copy the images at the head of the model's forward.",
    gradients=False,
)
def _input(evidence: Evidence) -> Finding:
    look = evidence.victim.look
    if look is not None and look.writes:
        return Finding(True, "the model writes into the images it is given; every number was taken with copies")
    return Finding(True, "the images come back as they were sent")
