"""Auto-PGD: projected gradient ascent that chooses its own step sizes, image by image (Croce and Hein 2020)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import torch
from pydantic import Field, model_validator

from gambeson.attacks.climb import Climb, Record
from gambeson.attacks.losses import LossName, fallen
from gambeson.attacks.per_image import GradientAttack, warn_of_fallback
from gambeson.attacks.registry import register
from gambeson.attacks.solver import Ascent
from gambeson.base import Number, generator


@register("auto-pgd", source="Croce and Hein 2020", cost="steps + 1 / steps, per restart")
class AutoPGD(GradientAttack):
    """Auto-PGD (Croce and Hein 2020, algorithm 1), norms inf, 2 and 1.

    Steps start long and with momentum; at checkpoints that come closer and closer, an image whose loss has
    stopped rising has its step halved and goes on from its best point. For each image the result is a perturbation
    that succeeds, else the one of highest loss. Costs, an image and restart: ``steps`` + 1 forwards and ``steps``
    backwards; with ``targets``, as much for each target and one forward more in all; with ``scout`` as well,
    ``scout`` + 1 forwards and ``scout`` backwards for each target, and the full climb for ``keep`` of them. An image
    that has fallen costs nothing more.

    The norm 1 has the same schedule with the steepest step in ball and box (ours); the schedule that Croce and Hein
    published for it in 2021 is :class:`gambeson.attacks.l1_auto_pgd.L1AutoPGD`. ``loss="dlr"`` is APGD-DLR,
    ``targets=9`` with it APGD-T (:class:`TargetedAutoPGD`).
    """

    steps: Annotated[int, Field(ge=1)] = 100
    """Gradient steps a restart; the paper's 100."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Length of the first steps as a share of eps; 2 where it is not given, as in the paper, and 1 in the norm 1."""
    inertia: Annotated[Number, Field(gt=0, le=1)] = 0.75
    """Share of the new step in a move, the rest repeats the last one: the paper's alpha."""
    rise: Annotated[Number, Field(ge=0, le=1)] = 0.75
    """Share of steps that must raise the loss between two checkpoints: the paper's rho."""
    targets: Annotated[int, Field(ge=1)] | None = None
    """Attack towards this many of the likeliest wrong classes of the clean image, one after the other: an image has
    fallen once any wrong class is reached. At most the number of classes less one. None: no targets."""
    scout: Annotated[int, Field(ge=1)] | None = None
    """With ``targets``: climb towards each of them for this many steps first, with a schedule of that length, and
    spend the full ``steps`` only on the ``keep`` targets that came nearest, nearest first (ours).
    None: the full steps on every target, as in the paper."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Targets that are climbed in full after the scouts."""

    @model_validator(mode="after")
    def _check_targets(self) -> AutoPGD:
        if self.targets is not None and self.reaches:
            raise ValueError("with targets the attack chooses what to reach; leave out targeted and least-likely")
        if self.scout is not None and self.targets is None:
            raise ValueError("scout is for an attack that tries several targets; set targets as well, or leave it out")
        return self

    @property
    def checkpoints(self) -> list[int]:
        """Steps at which step sizes are judged (section 3.1): after 22 % of the steps, then at shorter distances."""
        shares = [0.0, 0.22]
        while shares[-1] < 1:
            shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        return sorted({math.ceil(round(share * self.steps, 6)) for share in shares[1:] if share < 1})

    @property
    def _first(self) -> float:
        if self.step is not None:
            return self.step
        return 1.0 if self.norm == "1" else 2.0

    def _search(self, ascent: Ascent, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor) -> None:
        record = Record.into(best)
        if self.targets is None:
            for restart in range(self.restarts):
                self._climb(ascent, x, y, y, f"{restart}", seed, record)
            return
        with torch.no_grad():
            logits = ascent.victim(x)
        # An image that is wrong as it is needs no perturbation.
        record.fallen.copy_(fallen(logits, y, ascent.ignore_index))
        ascent = dataclasses.replace(ascent, loss=ascent.loss.model_copy(update={"targeted": True}))
        counts = torch.ones_like(y, dtype=torch.bool) if ascent.ignore_index is None else y != ascent.ignore_index
        own = y.where(counts, torch.zeros_like(y)).unsqueeze(1)
        order = logits.scatter(1, own, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : min(self.targets, logits.shape[1] - 1)]
        for restart in range(self.restarts):
            tried = order
            if self.scout is not None:
                brief = self.model_copy(update={"steps": self.scout})
                reached = [
                    brief._climb(ascent, x, target.where(counts, y), y, f"{restart}/scout/{rank}", seed, record)
                    for rank, target in enumerate(order.unbind(1))
                ]
                nearest = torch.stack(reached, 1).argsort(dim=1, descending=True, stable=True)
                chosen = nearest[:, : self.keep].reshape(len(x), -1, *[1] * (order.ndim - 2))
                tried = order.gather(1, chosen.expand(-1, -1, *order.shape[2:]))
            for rank, target in enumerate(tried.unbind(1)):
                self._climb(ascent, x, target.where(counts, y), y, f"{restart}/{rank}", seed, record)

    def _climb(
        self,
        ascent: Ascent,
        x: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        name: str,
        seed: int,
        record: Record,
    ) -> torch.Tensor:
        """Climb once, from a random start, on every image that stands; return the highest loss of each (N,)."""
        # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
        start = ascent.start(x, len(x), "uniform", 1.0, generator(seed, "start", name, device=x.device))
        reached = x.new_full((len(x),), -torch.inf)
        rows = (~record.fallen).nonzero().flatten() if self.early_stop else torch.arange(len(x), device=x.device)
        if len(rows) == 0:
            return reached
        state = self._rise(ascent, rows, x[rows], labels[rows], truth[rows], start[rows], record)
        reached[state.rows] = state.best_value
        return reached

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
        """Climb from ``delta`` and return where those are that have not fallen."""
        state, judged = self._begin(ascent, rows, images, labels, truth, delta, record), 0
        for step in range(1, self.steps + 1):
            if len(state.rows) == 0:
                break
            if step > 1 and step - 1 in self.checkpoints:
                state, judged = state.judge(step - 1 - judged, self.rise), step - 1
            state = self._step(ascent, state, step, record)
        return state

    def _begin(
        self,
        ascent: Ascent,
        rows: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        delta: torch.Tensor,
        record: Record,
    ) -> Climb:
        gradient, logits = ascent.look(delta, images, labels, truth=self._measure(truth), number=1)
        warn_of_fallback(ascent.loss, logits.shape[1])
        value = ascent.loss(logits, labels, ascent.ignore_index, self._measure(truth))
        state = Climb(
            rows=rows,
            images=images,
            labels=labels,
            truth=truth,
            delta=delta,
            before=delta,
            gradient=gradient,
            value=value,
            best=delta,
            best_gradient=gradient,
            best_value=value,
            length=torch.full_like(value, self._first * self.eps),
            rises=torch.zeros_like(value),
            checked_value=value,
            halved=torch.zeros_like(value, dtype=torch.bool),
        )
        return self._note(ascent, self._equip(state), logits, record)

    def _equip(self, state: Climb) -> Climb:
        """Add what a variant keeps of each image beside."""
        return state

    def _step(self, ascent: Ascent, now: Climb, step: int, record: Record) -> Climb:
        delta = self._move(ascent, now)
        if step > 1 and self.inertia < 1:
            mixed = now.delta + self.inertia * (delta - now.delta) + (1 - self.inertia) * (now.delta - now.before)
            delta = ascent.project(mixed, now.images)
        truth = self._measure(now.truth)
        if step == self.steps:  # nothing follows that would need a gradient
            value, logits = ascent.values(delta, now.images, now.labels, truth=truth)
            return self._note(ascent, now.arrive(delta, now.gradient, value), logits, record)
        gradient, logits = ascent.look(delta, now.images, now.labels, truth=truth, number=step + 1)
        value = ascent.loss(logits, now.labels, ascent.ignore_index, truth)
        return self._note(ascent, now.arrive(delta, gradient, value), logits, record)

    def _move(self, ascent: Ascent, now: Climb) -> torch.Tensor:
        return ascent.move(now.delta, now.images, now.gradient, now.length.view(-1, 1, 1, 1))

    def _note(self, ascent: Ascent, state: Climb, logits: torch.Tensor, record: Record) -> Climb:
        down = fallen(logits, state.truth, ascent.ignore_index, targeted=self.reaches)
        record.note(state.rows, state.delta, state.value, down)
        return state.only(~down) if self.early_stop and bool(down.any()) else state

    def _measure(self, truth: torch.Tensor) -> torch.Tensor | None:
        """Return the true labels where a targeted loss is measured against them."""
        return None if self.targets is None else truth


@register("auto-pgd-targeted", source="Croce and Hein 2020, section 5", cost="as `auto-pgd`, per target")
class TargetedAutoPGD(AutoPGD):
    """APGD-T (Croce and Hein 2020, section 5): the targeted ratio, towards the nine likeliest wrong classes in turn."""

    loss: LossName = "dlr"
    targets: Annotated[int, Field(ge=1)] | None = 9
