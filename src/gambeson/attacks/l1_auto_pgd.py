"""l1-APGD: Auto-PGD for the norm 1, which chooses image by image how sparse its steps are (Croce and Hein 2021)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, model_validator

from gambeson.attacks.auto_pgd import AutoPGD
from gambeson.attacks.climb import Climb, Record
from gambeson.attacks.registry import register
from gambeson.attacks.solver import Ascent
from gambeson.base import Number
from gambeson.threat import Norm

_DENSER = 1.5
"""A step moves the number of values that the best point changes over this (algorithm 1)."""
_FEWER = 0.95
"""The best point has become sparser where it changes less than this share of the values that it changed before."""
_SHORTER = 1.5
_SHORTEST = 10.0


@register("l1-auto-pgd", source="Croce and Hein 2021", cost="as `auto-pgd`")
class L1AutoPGD(AutoPGD):
    """l1-APGD (Croce and Hein 2021, section 4, algorithm 1): adaptive sparsity and step size, exact projection.

    A step moves a share of the values with the largest gradients equally, then the point is projected on ball and
    box at once. Every 4 % of the steps the share becomes what the best point changes, over 1.5. Where the best point
    has become sparser by 5 % the climb goes on from it with steps of full length; elsewhere steps are shortened by
    1.5, down to a tenth. There is no momentum. ``radii`` is the paper's multi-eps form. Costs are Auto-PGD's, and
    one forward more for each radius after the first.
    """

    norm: Norm = "1"
    """The norm 1 alone."""
    exact_box: bool = True
    """Pass over values that the box stops, so that a sparse step is not spent on them (ours: where the largest
    gradients point out of the box, the published form stands still). False: as published."""
    inertia: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """1: no momentum, as in the authors' code."""
    share: Annotated[Number, Field(gt=0, le=1)] | None = 0.2
    """Share of the values that the first steps move: the paper's 0.2. None: as many as the start changes over 1.5,
    which is what every stage after the first does."""
    radii: tuple[Annotated[Number, Field(ge=1)], ...] = (3.0, 2.0, 1.0)
    """Radii of the stages as multiples of eps; each stage goes on from the best point of the one before, projected on
    its own ball. The last must be 1: only there does a perturbation count. (1,) is the single-eps form."""
    portions: tuple[Annotated[Number, Field(gt=0)], ...] = (0.3, 0.3, 0.4)
    """Share of the steps that each stage takes; the last takes what is left."""

    @model_validator(mode="after")
    def _check_stages(self) -> L1AutoPGD:
        if self.norm != "1":
            raise ValueError(f"this attack is for norm '1', and the norm is {self.norm!r}; use AutoPGD for others")
        if self.sparsity is not None:
            raise ValueError("this attack adapts the sparsity of its steps; set share, where it begins, instead")
        if not self.radii or self.radii[-1] != 1:
            raise ValueError(f"radii {self.radii} must end with 1, the ball in which a perturbation counts")
        if len(self.portions) < len(self.radii):
            raise ValueError(f"{len(self.radii)} radii need as many portions, and there are {len(self.portions)}")
        return self

    @property
    def checkpoints(self) -> list[int]:
        """Steps at which sparsity and step sizes are chosen anew: every 4 % of them."""
        return list(range(0, self.steps, max(1, math.floor(0.04 * self.steps + 1e-9))))[1:]

    def _rise(
        self,
        ascent: Ascent,
        rows: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        delta: torch.Tensor,
        record: Record,
    ) -> Climb:
        left, share = self.steps, self.share
        for radius, portion in zip(self.radii[:-1], self.portions, strict=False):
            steps = min(round(portion * self.steps), left - 1)
            if steps < 1:
                continue
            wide = self._stage(steps, radius, share)
            # What is found outside the ball of eps is no result, and nothing has fallen there.
            scratch = Record.into(torch.zeros_like(images))
            place = torch.arange(len(rows), device=rows.device)
            outer = dataclasses.replace(ascent, ball=wide.ball)
            delta = outer.project(delta, images)
            state = super(L1AutoPGD, wide)._rise(outer, place, images, labels, truth, delta, scratch)
            delta, left, share = state.best, left - steps, None
        last = self._stage(left, 1.0, share).model_copy(update={"early_stop": self.early_stop})
        delta = ascent.project(delta, images)
        return super(L1AutoPGD, last)._rise(ascent, rows, images, labels, truth, delta, record)

    def _stage(self, steps: int, radius: float, share: float | None) -> L1AutoPGD:
        return self.model_copy(update={"steps": steps, "eps": self.eps * radius, "early_stop": False, "share": share})

    def _equip(self, state: Climb) -> Climb:
        changed, size = _changed(state.delta), state.delta[0].numel()
        moved = changed / _DENSER if self.share is None else torch.full_like(changed, self.share * size)
        before = changed if self.share is None else torch.full_like(changed, size)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return SparseClimb(**fields, moved=moved, changed=before, longest=state.length)

    def _move(self, ascent: Ascent, now: Climb) -> torch.Tensor:
        assert isinstance(now, SparseClimb)
        slope = now.gradient.flatten(1)
        if self.exact_box:
            room = torch.where(now.gradient > 0, 1 - now.images - now.delta, now.images + now.delta)
            slope = slope.masked_fill(room.flatten(1) <= 0, 0)
        size = slope.abs()
        last = now.moved.long().clamp(1, size.shape[1]) - 1
        least = size.sort(dim=1, descending=True).values.gather(1, last.unsqueeze(1))
        signs = slope.sign() * (size >= least)
        move = now.length.unsqueeze(1) * signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
        return ascent.project(now.delta + move.view_as(now.delta), now.images)


@dataclass(frozen=True, kw_only=True)
class SparseClimb(Climb):
    """A climb whose steps move a number of values that is its own."""

    moved: torch.Tensor
    """Values that a step moves."""
    changed: torch.Tensor
    """Values that the best point changed at the last checkpoint."""
    longest: torch.Tensor
    """Step size at the start, pixel units."""

    def judge(self, steps: int, rise: float) -> SparseClimb:
        """Choose sparsity and step size anew (algorithm 1); neither argument plays a part."""
        changed = _changed(self.best)
        sparser = changed < _FEWER * self.changed
        back = sparser.view(-1, 1, 1, 1)
        shorter = (self.length / _SHORTER).maximum(self.longest / _SHORTEST)
        return dataclasses.replace(
            self,
            delta=torch.where(back, self.best, self.delta),
            before=torch.where(back, self.best, self.before),
            gradient=torch.where(back, self.best_gradient, self.gradient),
            value=torch.where(sparser, self.best_value, self.value),
            length=torch.where(sparser, self.longest, shorter),
            moved=changed / _DENSER,
            changed=changed,
        )


def _changed(delta: torch.Tensor) -> torch.Tensor:
    return (delta != 0).flatten(1).sum(1).to(delta.dtype)
