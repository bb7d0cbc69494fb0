"""Universal NES: natural evolution strategies over patterns of signs, by scores alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from gambeson.attacks.losses import Loss
from gambeson.attacks.registry import register
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.target import TargetSetting
from gambeson.base import Number, generator, tracked
from gambeson.data import Dataset
from gambeson.threat import perturb
from gambeson.victim import auto_batch_size

_SURE = 0.95
"""Largest mean of a sign, so that the other one is still drawn now and then (ours)."""


@register("universal-nes", source="after Wierstra et al. 2014", cost="queries / 0")
class UniversalNES(UniversalAttack):
    """Natural evolution strategies over one pattern of signs for all images (ours, after Wierstra et al. 2014).

    Every value of the pattern is +1 or -1 with a mean of its own, zero at first. A step draws a pattern for each image
    of a batch, scales it to norm eps, and asks how far the image's margin rises; the means follow the natural gradient
    of the expected rise, the mean of rise times (sign - mean). What is kept is the likelier sign of each value. No
    query is spent on a pattern that others share, and signs at full size see what gradients do not: rounded or
    misleading scores, and patterns that change answers behind a threshold. Images of many pixels need more queries than
    smooth patterns do (:class:`PerlinNoise`). Cost: ``queries`` forwards, and those of validation.
    """

    gradients: ClassVar[bool] = False

    queries: Annotated[int, Field(ge=1)] = 100_000
    """Images asked about, those without a pattern included."""
    batch_size: Annotated[int, Field(ge=1)] = 500
    """Images a step, each with a pattern of its own."""
    images: Annotated[int, Field(ge=1)] = 2000
    """Training images; each is asked about once without a pattern."""
    rate: Annotated[Number, Field(gt=0)] = 0.02
    """Root mean square of what a step adds to the means."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the steps summed."""
    target: TargetSetting = None
    """What should be predicted, such as a class for every image (:class:`gambeson.attacks.Target`); None: anything
    wrong."""

    def asked(self, data: Dataset) -> int:
        """Return about how many images a deterministic model will be asked about."""
        return self.queries + len(data.validation) * max(1, len(self.edits))

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        draw = generator(context.seed, "universal-nes", device=context.device)
        train, most = context.train, auto_batch_size(context.train.shape)
        few = train.sample_indices(min(self.images, max(1, self.queries // 2)), seed=context.seed)
        clean = torch.cat([self._margins(context, rows) for rows in few.split(most)])
        means = torch.zeros(context.shape, device=context.device)
        summed, left = torch.zeros_like(means), self.queries - len(few)
        sizes = [self.batch_size] * (left // self.batch_size) or [left] * bool(left)
        for size in tracked(sizes, "steps", len(sizes)):
            rises, signs, products = means.new_zeros(()), torch.zeros_like(means), torch.zeros_like(means)
            for picked in torch.randint(len(few), (size,), generator=draw, device=draw.device).split(most):
                chance = torch.rand((len(picked), *train.shape), generator=draw, device=draw.device)
                drawn = torch.where(chance < (1 + means) / 2, 1.0, -1.0)
                found = self._margins(context, few[picked.cpu()], self.ball.fill(drawn))
                rise = (found - clean[picked]).to(means.dtype)
                rises, signs = rises + rise.sum(), signs + drawn.sum(0)
                products += torch.einsum("n,nchw->chw", rise, drawn)
            step = products - rises / size * signs  # the rise less its mean, times the signs less theirs
            summed = self.momentum * summed + step / step.square().mean().sqrt().clamp(min=1e-30)
            means = (means + self.rate * summed).clamp(-_SURE, _SURE)
        yield Candidate(start="zero", delta=self.ball.fill(torch.where(means < 0, -1.0, 1.0)))
        if start is not None:
            yield Candidate(start="given", delta=start)

    @torch.no_grad()
    def _margins(self, context: CraftingContext, rows: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss of training images (N,), the mean over the models; behind an edit that is drawn, if any.

        Args:
            context: the models and images.
            rows: (N,) places of the images.
            delta: (N, C, H, W), added to them.
        """
        images, labels = context.train.take(rows, context.device)
        targets, weights = context.aims(images, labels, rows)
        moved = images if delta is None else perturb(images, delta)
        loss = Loss(kind="margin", targeted=self.target is not None)
        each = [
            loss(victim.forward_original(moved), targets, context.task, weights=weights) for victim in context.edited
        ]
        return torch.stack(each).mean(0)
