"""Re-scoring: perturbed images are answered again in other batches, and from other points inside their ball.

A classifier answers an image, not a batch, and what it withstands at the surface of a ball it has to withstand inside.
Each way of asking again is first tried on part of the images; where it makes a clear difference, all of them are asked
that way, and the worst answer counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.outcome import LEVEL, PairedDifference, clearly_more
from gambeson.auditing.results import Rescored
from gambeson.base import full_precision, generator, seeded
from gambeson.data import Split
from gambeson.evaluation import BudgetSpent
from gambeson.evaluation.outcome import at_once
from gambeson.tasks import Counts
from gambeson.threat import Ball, perturb
from gambeson.victim import Caller, Victim, auto_batch_size, vote
from gambeson.victim.scoring import predicted

MOST = 1000
"""Images on which a way of asking is tried first (ours): that 15 more are wrong is clear, 1.5 % of them."""
ROUNDING = 0.01
"""Share of answers that may change with the batch (ours): its sums are added up in another order."""
SHRINK = 0.06
"""What a value of a perturbation loses at the most, as a share of itself (ours)."""
LARGEST = 1024
_VALUES = 2**23
"""Values of the largest batch: twice those of a batch that rates are taken on."""
_UNSEEDED = torch.Generator().initial_seed()
"""Of torch's generator where nobody has set it; other callers set 0, 42 or 1234."""
_USUAL = (2, 4, 8, 10, 16, 20, 24, 25, 32, 40, 48, 50, 64, 80, 96, 100, 120, 125, 128, 150, 192, 200, 250, 256)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of asking for the answers to images once more."""

    name: str
    share: float = 1.0
    """Part of the images that it is tried on first."""
    size: int = 0
    """Images of a batch, of which the last is filled up by repeating some; 0: that of reporting."""
    mates: Literal["perturbed", "clean", "copies"] = "perturbed"
    """What an image shares its batch with: other perturbed images; half of the batch clean; copies of itself."""
    caller: Caller | None = None
    """How the model is called in a thread of its own, on whose stack nothing tells an audit from other callers; None:
    in the audit's."""
    channels_last: bool = False
    """Whether images lie in memory channel by channel of each pixel."""
    seed: int | None = None
    """Of torch's global generator while the model answers; None: derived from the audit's."""
    inside: Literal["", "shrunk", "halved", "8 bits", "jittered"] = ""
    """How the perturbation is moved away from the surface of its ball: each value shrunk by up to 6 %, or by up to a
    half; rounded to steps of 1/255 towards zero; shrunk by 2 % and moved at random by up to as much."""

    def batches(self, rows: torch.Tensor, draw: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the images of each batch, and which of them are perturbed."""
        rows = rows[torch.randperm(len(rows), generator=draw)]
        if self.mates == "copies":
            yield from ((row.repeat(self.size), torch.ones(self.size, dtype=torch.bool)) for row in rows)
        elif self.mates == "clean":
            others = rows.roll(-(self.size // 2))
            for half, mates in zip(rows.split(self.size // 2), others.split(self.size // 2), strict=True):
                order = torch.randperm(2 * len(half), generator=draw)
                yield torch.cat([half, mates])[order], order < len(half)
        else:
            for part in rows.split(self.size):
                who = part if self.inside else part.repeat(-(-self.size // len(part)))[: self.size]
                yield who, torch.ones(len(who), dtype=torch.bool)

    def moved(self, delta: torch.Tensor, ball: Ball, draw: torch.Generator) -> torch.Tensor:
        """Return the perturbation (R, C, H, W) at another point of its ball."""
        if self.inside == "8 bits":
            return (255 * delta + 1e-3 * delta.sign()).trunc() / 255
        if self.inside == "jittered":
            near = Ball(eps=0.02 * ball.eps, norm=ball.norm).uniform(delta.shape, draw)
            return 0.98 * delta + near.to(delta)
        most = SHRINK if self.inside == "shrunk" else 0.5
        return delta * (1 - most * torch.rand(delta.shape, generator=draw, device=draw.device)).to(delta)


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """Images as they were scored: clean, under a shared perturbation, or each under its own."""

    split: Split
    """The clean images."""
    right: Counts
    """What was right of each as reported."""
    delta: torch.Tensor | None = None
    """(1, C, H, W), a shared perturbation."""
    images: torch.Tensor | None = None
    """(N, C, H, W), images perturbed one by one."""

    def take(
        self, context: AuditContext, way: Way, rows: torch.Tensor, perturbed: torch.Tensor, draw: torch.Generator
    ) -> torch.Tensor:
        """Return the images of a batch, those of them perturbed that are to be, in the way's manner."""
        device = context.victim.device
        clean, _ = self.split.take(rows, device)
        if self.delta is not None:
            moved = perturb(clean, self.delta.to(device))
        elif self.images is not None:
            moved = self.images[rows].to(device)
            if way.inside:
                moved = perturb(clean, way.moved(moved - clean, _ball(context), draw))
        else:
            return clean
        return torch.where(perturbed.to(device).view(-1, 1, 1, 1), moved, clean)


def _ball(context: AuditContext, eps: float | None = None) -> Ball:
    return Ball(eps=context.eps if eps is None else eps, norm=context.suite.norm)


def batch_sizes(shape: Sequence[int]) -> list[int]:
    """Return the sizes of batches that people take, up to the largest that images of this shape are asked for in."""
    largest = auto_batch_size(shape, LARGEST, _VALUES)
    return [size for size in _USUAL if size <= largest] or [1]


def ways(context: AuditContext, *, clean: bool = False) -> list[Way]:
    """Return the ways of asking that suit a model.

    A random model's answers differ by chance, so that it is asked in fewer ways; a black box is paid by the query.

    Args:
        context: of the audit.
        clean: whether images are clean, so that there is no perturbation to move.
    """
    shape, box, random = context.test.shape, context.subject.black_box, context.subject.random
    largest = auto_batch_size(shape, LARGEST, _VALUES)
    half = Way(
        name="in batches of 32, half of them clean", size=min(32, largest + largest % 2), share=0.5, mates="clean"
    )
    inside = [
        Way(name="with every change shrunk at random by up to 6 %", inside="shrunk"),
        Way(name="with every change shrunk at random by up to a half", inside="halved"),
        Way(name="with changes rounded to 1/255", inside="8 bits"),
        Way(name="with changes shrunk by 2 % and jittered", inside="jittered"),
    ]
    batches = [
        replace(half, share=1.0) if box else half,
        Way(name="one by one", size=1, share=0.125),
        Way(name="in batches of 7", size=7, share=0.25),
        Way(name=f"in batches of {largest:,}", size=largest),
        Way(name="beside copies of itself", size=32, share=0.01, mates="copies"),
        Way(name="in a thread of its own", share=0.25, caller="no_grad", seed=0),
        Way(name="in inference mode", share=0.25, caller="inference", seed=42),
        Way(name="in channels-last layout", share=0.25, caller="no_grad", channels_last=True, seed=1234),
        Way(name="with gradients on", size=min(32, at_once(context.test)), share=0.25, caller="grad", seed=_UNSEEDED),
    ]
    if not (clean or context.suite.rescoring):
        return []
    if box or random:
        batches, inside = batches[:1], inside[:1]
    return batches if clean else batches + inside


@torch.no_grad()
def asked(
    context: AuditContext, found: Perturbed, way: Way, rows: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Return the predictions for images asked in one way, in the order of ``rows``; None: all images.

    Args:
        context: of the audit.
        found: the images.
        way: of asking.
        rows: indices.
        eps: of the ball; None: the middle one.
    """
    size = way.size or auto_batch_size(found.split.shape)
    rows = torch.arange(len(found.split)) if rows is None else rows
    order, draw = generator(context.seed, "batches", way.name), generator(context.seed, "inside", way.name)
    if way.inside and found.delta is not None:  # moved once: it has to stay one for all
        found = replace(found, delta=way.moved(found.delta.cpu(), _ball(context, eps), draw))
    draw = generator(context.seed, "inside", way.name, device=context.victim.device)
    place = torch.empty(len(found.split), dtype=torch.long)
    place[rows] = torch.arange(len(rows))
    answers = None
    with seeded(context.seed, "score"):
        if way.seed is not None:
            torch.manual_seed(way.seed)
        for who, perturbed in replace(way, size=size).batches(rows, order):
            images = found.take(context, way, who, perturbed, draw)
            predictions = (_apart(context.victim, images, way) if way.caller else vote(context.victim, images)).cpu()
            answers = predictions.new_empty(len(rows), *predictions.shape[1:]) if answers is None else answers
            answers[place[who[perturbed]]] = predictions[perturbed]
    assert answers is not None
    return answers


def _apart(victim: Victim, images: torch.Tensor, way: Way) -> torch.Tensor:
    if way.channels_last:
        images = images.clone(memory_format=torch.channels_last)  # its strides also where there is one channel
    with full_precision(images.device):
        return predicted(victim.forward_apart(images, way.caller or "no_grad"))


def rescored_in(context: AuditContext, found: Perturbed, tried: Sequence[Way]) -> list[Rescored]:
    """Ask again in each way for a part of the images, and compare with what was reported of the same ones.

    All ways together, for better and for worse, are one comparison of the audit's level.
    """
    if not tried:
        return []
    level = LEVEL / (2 * len(tried))
    few = min(MOST, len(found.split), context.suite.sample if context.subject.black_box else MOST)
    results = []
    for way in tried:
        count = max(1, round(way.share * few))
        rows = found.split.sample_indices(count, seed=context.seed)
        try:
            predictions = asked(context, found, way, rows)
        except BudgetSpent:
            raise
        except Exception:  # made for one size of batch; statistics of a single image
            if way.inside:
                raise
            continue
        results.append(_compared(context, found, way, rows, predictions, level))
    return results


def _compared(
    context: AuditContext, found: Perturbed, way: Way, rows: torch.Tensor, predictions: torch.Tensor, level: float
) -> Rescored:
    split = found.split
    labels = split.take(rows, "cpu")[1]
    before = Counts(found.right.right.cpu()[rows], found.right.total.cpu()[rows])
    now = split.task.counts(predictions, labels)
    gain, loss = (PairedDifference.of(*pair, level=level) for pair in ((before, now), (now, before)))
    flipped, differs = int((before.right != now.right).sum()), gain.low > 0
    if not way.inside:
        differs = differs or loss.low > 0
        if not context.subject.random and split.task.per_image_label:
            differs = differs or clearly_more(flipped, len(rows), ROUNDING)
    return Rescored(
        way=way.name,
        images=len(rows),
        reported=float(before.accuracy.value),
        right=float(now.accuracy.value),
        flipped=flipped,
        differs=differs,
    )


def worse(found: Iterable[Rescored], tried: Iterable[Way]) -> list[Way]:
    """Return the ways in which clearly less is right than was reported; batches of copies are for the check alone."""
    accused = {one.way for one in found if one.differs and one.right < one.reported}
    return [way for way in tried if way.name in accused and way.mates != "copies"]
