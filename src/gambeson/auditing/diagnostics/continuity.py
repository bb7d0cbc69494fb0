"""Scores that do not tell where the answer changes: margins have to vanish there."""

from __future__ import annotations

import torch

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.base import generator, seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.outcome import at_once

_HALVINGS = 20
"""Of a line, so that what is left of it is a millionth."""
_JUMP, _SHARE = 0.1, 0.1
"""Of the median margin, what may be left where the answer changes, and on which share of the lines more may be:
activations of 8 bits come to 0.015 on nine lines of ten, and functions without jumps to nothing (ours)."""


@register(
    "margin vanishes where the answer changes",
    condition=f"on clearly more than {100 * _SHARE:g} % of straight lines between two images that are answered "
    f"differently, the margin of the scores is still more than {100 * _JUMP:g} % of the median margin on one side of "
    "the place where the answer changes",
    explanation="The answer is not decided by the scores that attacks climb: they may be another network's, or jump at "
    "the boundary, so that neither loss nor gradient shows the way there, however true the gradient is of them.",
    remedy="Attack what decides: the network behind the answer, or the model by decisions and by transfer.",
)
def _continuous(context: AuditContext) -> Finding:
    victim, split = context.victim, context.sample
    if not split.task.per_image_label:
        return Finding(None, "it is for one answer per image")
    first, _ = split.take(slice(None), victim.device)
    order = torch.randperm(len(first), generator=generator(context.seed, "lines"))
    last = first[order.to(first.device)]

    def asked(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (N,) and margins (N,), of a random model all from the same draw."""
        answers, margins = [], []
        for x in images.split(at_once(split)):
            with torch.no_grad(), seeded(context.seed, "one draw"):
                best = victim.forward_original(x).double().topk(2, 1)
            answers.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
        return torch.cat(answers), torch.cat(margins)

    answers, margins = asked(first)
    if victim.traits is not None and victim.traits.varies and not torch.equal(asked(first)[1], margins):
        return Finding(None, "the model is random and no seed of torch makes it repeat itself")
    median, (ends, _) = float(margins.nanmedian()), asked(last)
    lines = answers != ends
    if not bool(lines.any()) or not 0 < median < torch.inf:
        return Finding(None, "no two images of the sample are answered differently with a margin")
    low, high = first.new_zeros(len(first)), first.new_ones(len(first))

    def at(share: torch.Tensor) -> torch.Tensor:
        return first + share.view(-1, *[1] * (first.ndim - 1)) * (last - first)

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        changed = asked(at(middle))[0] != answers
        low, high = torch.where(changed, low, middle), torch.where(changed, middle, high)
    left = torch.maximum(asked(at(low))[1], asked(at(high))[1])[lines] / median
    jumps = Rate.of(int((~(left <= _JUMP)).sum()), int(lines.sum()))
    return Finding(
        jumps.low <= _SHARE,
        f"where the answer changes, on {jumps} of {len(left)} lines between images more than {100 * _JUMP:g} % of the "
        f"median margin is left; on half of them more than {100 * float(left.median()):.2g} %",
        {"jumps": jumps.value, "median left": float(left.median())},
    )
