"""Answers that depend on more than the image: on the rest of its batch, or on what was asked before."""

from __future__ import annotations

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import clearly_more
from gambeson.auditing.rescoring import batch_sizes
from gambeson.base import generator, seeded
from gambeson.evaluation import BudgetSpent
from gambeson.victim import Victim, predict
from gambeson.victim.inspect import size_of
from gambeson.victim.victim import copied

_PROBES = 8
_OTHERS = 24
_BURST = 120
_REPEATS = 10
_NEAR = tuple(size / 255 for size in (1, 4, 16))
"""Sizes of nudges, of which the first is taken that has to move a model's logits beyond its noise."""
_EACH = 12
_NOISE = 0.01
"""What rounding may do: batches of another size are added up in another order."""
_TIMES = 6
"""How often a random model must do the same again: one that draws among few answers does so once or twice by chance."""
_BEYOND = 3
"""Factor on the largest difference of as many repeated calls beyond which a difference is none of the noise (ours)."""
_EXACT = 1e-4
"""What copies that were asked the same may differ by where a model does not vary."""
_UNREPEATABLE = Finding(
    None, "the model is random and no seed of torch makes it repeat itself: its answers cannot be told from its noise"
)
_REMEMBERS = "copies of the model answer alike after the same images and otherwise after others"
_STATEFUL = Finding(False, f"{_REMEMBERS}: it remembers what it was asked")


def _asked(context: AuditContext, images: torch.Tensor) -> torch.Tensor:
    """Return logits, of a model that varies all from the same draw; others draw from wherever the generators stand."""
    if context.victim.traits is not None and context.victim.traits.varies:
        return _at_one_draw(context.victim, images, context.seed)
    with torch.no_grad():
        return context.victim.forward_original(images)


def _at_one_draw(victim: Victim, images: torch.Tensor, seed: int) -> torch.Tensor:
    with torch.no_grad(), seeded(seed, "state"):
        return victim.forward_original(images)


def _apart(context: AuditContext, first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two answers, as a share of what tells classes apart."""
    traits = context.victim.traits
    size = float(size_of(first)) if traits is None else traits.size
    return float(((first - second).abs().max() / max(size, torch.finfo(first.dtype).tiny)).nan_to_num(torch.inf))


def _noise(context: AuditContext, images: torch.Tensor) -> float:
    """Return the largest difference of calls with the same images: the noise that torch's seeds do not fix."""
    first = _asked(context, images)
    return max(_apart(context, first, _asked(context, images)) for _ in range(_TIMES))


def _limit(noise: float) -> float:
    """Return the difference up to which two answers count as one; from 1 on, nothing can be told."""
    return max(_NOISE, _BEYOND * noise)


def _twins(context: AuditContext, *orders: list[torch.Tensor]) -> list[list[torch.Tensor]] | None:
    """Return the answers of copies of the model, each asked in its own order; None if there are no copies."""
    if context.subject.black_box:
        return None
    answers = []
    try:
        for order in orders:
            with Victim(copied(context.victim.model)) as twin:
                answers.append([_at_one_draw(twin, images.clone(), context.seed) for images in order])
    except Exception:  # what cannot be copied cannot be told
        return None
    return answers


def _like_its_copy(context: AuditContext, images: torch.Tensor, limit: float) -> bool:
    """Whether a copy made now answers as the model: not where a hook of the copy writes into the original."""
    other = images.flip(-1)  # not what the model was asked last, which a hook may have left in the copy
    found = _twins(context, [other])
    if found is None:
        return False
    return _apart(context, found[0][0], _at_one_draw(context.victim, other, context.seed)) <= limit


def _remembers(context: AuditContext, images: torch.Tensor) -> bool:
    """Whether copies of the model answer alike after the same images, and otherwise after others.

    A model that draws from a generator of its own also moves from call to call, but whatever the images were.
    """
    found = _twins(context, *[[images, images]] * _TIMES, [1 - images, images])
    if found is None:
        return False
    first, *again, other = (answers[-1] for answers in found)
    return _apart(context, first, other) > _limit(max(_apart(context, first, one) for one in again))


def _fresh(images: torch.Tensor, draw: torch.Generator) -> list[torch.Tensor]:
    """Return images that nobody has asked for, (1, C, H, W), off every grid of levels."""
    blends = (images + images.roll(1, 0)) / 2
    noise = torch.rand(blends.shape, generator=draw).to(blends)
    return list((0.8 * blends + 0.2 * noise).split(1))


def _nudged(image: torch.Tensor, size: float, draw: torch.Generator) -> torch.Tensor:
    noise = torch.rand(image.shape, generator=draw).to(image) * 2 - 1
    return (image + size * noise).clamp(0, 1)


def _replays(context: AuditContext, images: torch.Tensor) -> bool:
    """Whether copies answer an image otherwise after one near it than after as many far from it."""
    draw = generator(context.seed, "twins")
    pairs = [(image, _nudged(image, size, draw)) for image, size in zip(_fresh(images, draw), _NEAR, strict=False)]
    close = [image for pair in pairs for image in pair]
    apart = [other for image, near in pairs for other in (1 - image, near)]
    found = _twins(context, close, apart, apart, apart)
    if found is None:
        return False
    after, first, *again = (answers[1::2] for answers in found)
    return any(
        _apart(context, one, other) > max(_EXACT, _BEYOND * max(_apart(context, one, same[k]) for same in again))
        for k, (one, other) in enumerate(zip(first, after, strict=True))
    )


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
    limit = _limit(_noise(context, images))
    if limit >= 1:
        return _UNREPEATABLE
    beside = torch.cat([probes, others])
    # Flat images, half of them black: statistics of this batch are far from those of the other.
    flat = torch.linspace(-1, 1, len(others), device=images.device).clamp(min=0).view(-1, 1, 1, 1).expand_as(others)
    reference = _asked(context, beside)[: len(probes)]
    gap = _apart(context, reference, _asked(context, torch.cat([probes, flat]))[: len(probes)])
    alone = None
    if not context.subject.random:  # alone, a random model's noise falls on other values
        try:
            alone = _apart(context, reference, torch.cat([_asked(context, probe[None]) for probe in probes]))
        except Exception:  # a program that was exported for one batch size; statistics of a single image
            alone = None
    said = (
        "they cannot be asked for one by one"
        if alone is None
        else f"asked for one by one they differ by {100 * alone:.2g} %"
    )
    if context.subject.random:
        said = "both at one draw"
    sized = None if alone is None else _in_sizes(context, beside, reference)
    if sized is not None:
        said += f"; in batches of {sized[0]} by {100 * sized[1]:.2g} %, at the most of usual sizes"
    # Alone, and in batches of other sizes, a little noise falls on other values.
    noise = 0.0 if context.victim.traits is None else context.victim.traits.noise
    return Finding(
        gap <= limit and max(alone or 0.0, sized[1] if sized else 0.0) <= max(limit, _BEYOND * noise),
        f"between two batches the logits of {len(probes)} images differ by {100 * gap:.2g} % of their range; {said}",
        {"between_batches": gap, **({} if alone is None else {"alone": alone})},
    )


def _in_sizes(context: AuditContext, images: torch.Tensor, reference: torch.Tensor) -> tuple[int, float] | None:
    """Return the usual size of a batch in which the logits of the first images differ most, and how much.

    None for a black box, which is paid by the query, and where the suite asks nothing again.
    """
    apart: dict[int, float] = {}
    if context.subject.black_box or not context.suite.rescoring:
        return None
    for size in batch_sizes(context.test.shape):
        batch = images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]
        known = reference[:size]
        try:
            apart[size] = _apart(context, known, _asked(context, batch)[: len(known)])
        except BudgetSpent:
            raise
        except Exception:  # a program that was exported for some sizes
            continue
    worst = max(apart, key=apart.__getitem__, default=None)
    return None if worst is None else (worst, apart[worst])


def _moving(context: AuditContext, image: torch.Tensor, noise: float) -> float | None:
    """Return the smallest nudge that moves the largest logit well beyond the noise, by its gradient; None: none does.

    Looked at on an image that nobody has asked for yet: what is replayed need not have the gradient it had.
    """
    traits = context.victim.traits
    if context.subject.black_box or traits is None:
        return None
    with torch.enable_grad():
        point = image.clone().requires_grad_()
        gradient = context.victim.gradient(context.victim.forward_original(point).amax(), point, 1)
    slope = float(gradient.norm()) / 3**0.5 / max(traits.size, torch.finfo(torch.float32).tiny)
    return next((size for size in _NEAR if slope > 0 and slope * size > _BEYOND**2 * noise), None)


def _coarse(context: AuditContext, images: torch.Tensor, nudge: float, still: float) -> bool:
    """Whether logits stand still between levels, as quantised ones and a forest's do, and not by memory.

    A memory replays, always, what lies within its reach of a first query, and nothing beyond. Levels let images between
    them move at once, or some of the nudges of a size and not others.
    """
    draw, mixed = generator(context.seed, "coarse"), 0
    for k, image in enumerate(_fresh(images.flip(-1), draw)):
        first, size = _asked(context, image), nudge * 2**k
        moved = [_apart(context, first, _asked(context, _nudged(image, size, draw))) > still for _ in range(_EACH)]
        if k == 0 and any(moved):
            return True
        mixed += 0 < sum(moved) < _EACH
    return mixed > 1


def _at_first(context: AuditContext, images: torch.Tensor) -> float | None:
    """Return how far the model's answers, clean and perturbed, are from those of a copy that nobody has asked before.

    None where there is no such copy.
    """
    untouched, context.untouched = context.untouched, None  # from now on it has been asked
    if untouched is None:
        return None
    parts = [images, *(context.uaps[eps].apply(images) for eps in (context.eps,) if eps in context.uaps)]
    with Victim(untouched) as twin:
        first = [_at_one_draw(twin, part.clone(), context.seed) for part in parts]
    now = [_at_one_draw(context.victim, part, context.seed) for part in parts]
    return max(_apart(context, *pair) for pair in zip(first, now, strict=True))


@register(
    "stateless",
    condition="the same images get other answers later than at first, or after many queries near one of them; or all "
    "images near another get the logits of that one to the last digit",
    explanation="The model keeps a state between calls, as detectors of repeated queries do (Chen, Carlini and "
    "Wagner 2019): what looks like robustness is its memory of the attack.",
    remedy="Reset the model before each call, or audit the network behind the detector.",
    gradients=False,
)
def _memory(context: AuditContext) -> Finding:
    victim, subject = context.victim, context.subject
    images, _ = context.few(_PROBES, context.sample).take(slice(None), victim.device)
    noise = _noise(context, images)
    limit = _limit(noise)
    copies = _like_its_copy(context, images, limit)
    if copies and (_replays(context, images) or (noise > _NOISE and _remembers(context, images))):
        return _STATEFUL
    if limit >= 1:
        return _UNREPEATABLE
    # The whole split again where the model is random: with other batches it would not draw the same.
    count = len(context.test) if subject.random else min(context.suite.sample, len(context.test))
    rows = context.test.sample_indices(count, seed=context.seed)
    again, part = predict(victim, context.test.subset(rows)), _NOISE
    differ = again != context.predictions[rows]
    if noise > _NOISE:  # what seeds do not fix also changes answers
        part = max(part, 2 * float((predict(victim, context.test.subset(rows)) != again).float().mean()))
    changed = float(differ.float().mean())
    varies = victim.traits is not None and victim.traits.varies
    otherwise = clearly_more(int(differ.sum()), differ.numel(), part) if varies else changed > _NOISE
    first = _at_first(context, images) if copies else None
    before = _asked(context, images)
    draw = generator(context.seed, "burst")
    asked, gap, same = images[:1], 0.0, 0
    still, nudge = _BEYOND * noise, _moving(context, _fresh(images, draw)[-1], noise)
    alone = _asked(context, asked)
    for number in range(_BURST):
        if number % _REPEATS:
            same += _apart(context, _asked(context, _nudged(asked, nudge or _NEAR[0], draw)), alone) <= still
        else:
            gap = max(gap, _apart(context, alone, _asked(context, asked)))
    gap = max(gap, _apart(context, alone, _asked(context, asked)))
    after = _apart(context, before, _asked(context, images))
    # What has a gradient moves with its image; labels, rounded logits and the like need not.
    replayed = nudge is not None and same == _BURST - _BURST // _REPEATS
    replayed = replayed and not _coarse(context, images, nudge or 0.0, still)
    fresh = "" if first is None else f"; those of a copy that nobody had asked differ by {100 * first:.2g} %"
    return Finding(
        not otherwise and max(gap, after, first or 0.0) <= limit and not replayed,
        f"{100 * changed:.3g} % of the clean predictions differ from those at the audit's beginning; while {_BURST} "
        f"queries near one image were asked, its logits changed by {100 * gap:.2g} % of their range, and those of "
        f"{len(images)} images by {100 * after:.2g} %; {same} of the queries got its logits" + fresh,
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
