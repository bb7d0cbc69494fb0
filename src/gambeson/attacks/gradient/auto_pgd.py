"""Auto-PGD and its targeted and L1 variants: a step size that follows the progress of each image."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from gambeson.attacks.gradient.base import BestSoFar, GradientAttack
from gambeson.attacks.losses import MASKED, Loss, LossName, warn_of_fallback
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Number, generator
from gambeson.threat import Norm


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of one run, for the images that are not adversarial yet; every field has one row per image."""

    rows: torch.Tensor
    """Indices of the images in the batch."""
    images: torch.Tensor
    labels: torch.Tensor
    """Labels or targets of the loss."""
    truth: torch.Tensor
    """What decides whether an image is adversarial: ``labels``, unless an attack tries several targets."""
    delta: torch.Tensor
    before: torch.Tensor
    """``delta`` of the previous step."""
    gradient: torch.Tensor
    value: torch.Tensor
    """Loss at ``delta``."""
    best: torch.Tensor
    """Point of highest loss so far, with its gradient and value below."""
    best_gradient: torch.Tensor
    best_value: torch.Tensor
    length: torch.Tensor
    """Step size, pixel units."""
    rises: torch.Tensor
    """Steps since the last checkpoint that raised the loss."""
    checked_value: torch.Tensor
    """Best value at the last checkpoint."""
    halved: torch.Tensor
    """Whether the step size was halved at the last checkpoint."""

    def only(self, rows: torch.Tensor) -> State:
        """Return the state of some images."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def after_step(self, delta: torch.Tensor, gradient: torch.Tensor, value: torch.Tensor) -> State:
        """Return the state after a step to ``delta``."""
        better = value > self.best_value
        chosen = better.view(-1, 1, 1, 1)
        return dataclasses.replace(
            self,
            delta=delta,
            before=self.delta,
            gradient=gradient,
            value=value,
            best=torch.where(chosen, delta, self.best),
            best_gradient=torch.where(chosen, gradient, self.best_gradient),
            best_value=torch.where(better, value, self.best_value),
            rises=self.rises + (value > self.value),
        )

    def at_checkpoint(self, steps: int, rho: float) -> State:
        """Halve the step size of images whose loss has stopped increasing, and restart them from their best point.

        Croce and Hein 2020, section 3.1: condition 1 is that fewer than a share ``rho`` of the ``steps`` since the
        last checkpoint raised the loss; condition 2 that neither the step nor the best loss has changed since then.
        Their momentum is reset (ours; the paper does not say).
        """
        halve = (self.rises < rho * steps) | (~self.halved & (self.best_value <= self.checked_value))
        back = halve.view(-1, 1, 1, 1)
        return dataclasses.replace(
            self,
            delta=torch.where(back, self.best, self.delta),
            before=torch.where(back, self.best, self.before),
            gradient=torch.where(back, self.best_gradient, self.gradient),
            value=torch.where(halve, self.best_value, self.value),
            length=torch.where(halve, self.length / 2, self.length),
            rises=torch.zeros_like(self.rises),
            checked_value=self.best_value,
            halved=halve,
        )


@register("auto-pgd", source="Croce and Hein 2020", cost="steps + 1 / steps, per restart")
class AutoPGD(GradientAttack):
    """Auto-PGD (Croce and Hein 2020, algorithm 1), norms inf, 2 and 1.

    Steps are long at first and have momentum; at checkpoints of decreasing distance, images whose loss has stopped
    increasing have their step size halved and continue from their best point. The result per image is a successful
    perturbation, or else the one of highest loss. Costs per image and restart: ``steps`` + 1 forwards and ``steps``
    backwards; with ``targets``, the same per target plus one forward; with ``probe_steps`` as well, ``probe_steps`` + 1
    forwards and ``probe_steps`` backwards per target, and the full run for ``targets_kept`` of them. Adversarial images
    cost nothing more.

    The norm 1 uses the same schedule with the steepest step in ball and box (ours); the schedule that Croce and Hein
    published for it in 2021 is :class:`gambeson.attacks.gradient.auto_pgd.L1AutoPGD`. ``loss="dlr"`` is APGD-DLR,
    ``targets=9`` with it APGD-T (:class:`TargetedAutoPGD`).
    """

    steps: Annotated[int, Field(ge=1)] = 100
    """Gradient steps per restart; the paper's 100."""
    rel_step_size: Annotated[Number, Field(gt=0)] | None = None
    """Initial step size as a share of eps; by default 2, as in the paper, and 1 in the norm 1."""
    inertia: Annotated[Number, Field(gt=0, le=1)] = 0.75
    """Weight of the new step; the rest repeats the previous move (the paper's alpha)."""
    rho: Annotated[Number, Field(ge=0, le=1)] = 0.75
    """Share of steps between two checkpoints that must increase the loss (the paper's rho)."""
    targets: Annotated[int, Field(ge=1)] | None = None
    """Attack towards this many of the likeliest wrong classes of the clean image, one after the other: an image is
    adversarial once any wrong class is reached. At most the number of classes less one. None: no targets."""
    probe_steps: Annotated[int, Field(ge=1)] | None = None
    """With ``targets``: run towards each of them for this many steps first, then spend the full ``steps`` on the
    ``targets_kept`` that came nearest (ours). None: the full steps on every target, as in the paper."""
    targets_kept: Annotated[int, Field(ge=1)] = 3
    """Targets with the full steps after the probes."""
    radii: tuple[Annotated[Number, Field(ge=1)], ...] = (1.0,)
    """Radii of the stages of a run as multiples of eps (multi-eps, Croce and Hein 2021, section 4.3); each stage
    continues from the best point of the previous one, projected onto its ball. The last must be 1, where success
    counts."""
    portions: tuple[Annotated[Number, Field(gt=0)], ...] = (1.0,)
    """Share of the steps per stage; the last takes the rest."""
    start_size: Annotated[Number, Field(ge=0)] = 1.0
    """Radius of the random start as a share of eps."""

    @model_validator(mode="after")
    def _check_stages(self) -> AutoPGD:
        if not self.radii or self.radii[-1] != 1:
            raise ValueError(f"radii {self.radii} must end with 1, the ball in which success counts")
        if len(self.portions) < len(self.radii):
            raise ValueError(f"{len(self.radii)} radii need as many portions, and there are {len(self.portions)}")
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> AutoPGD:
        if self.targets is not None and self.reaches:
            raise ValueError("with targets the attack chooses what to reach; leave out targeted and least-likely")
        if self.probe_steps is not None and self.targets is None:
            raise ValueError("probe_steps is for an attack on several targets; set targets as well, or leave it out")
        return self

    @property
    def checkpoints(self) -> list[int]:
        """Checkpoints (section 3.1): after 22 % of the steps, then at decreasing distances."""
        shares = [0.0, 0.22]
        while shares[-1] < 1:
            shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        return sorted({math.ceil(round(share * self.steps, 6)) for share in shares[1:] if share < 1})

    @property
    def _first(self) -> float:
        return self.rel_step_size if self.rel_step_size is not None else 1.0 if self.norm == "1" else 2.0

    def _search(
        self, solver: ProjectedGradient, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor
    ) -> None:
        record = BestSoFar.into(best)
        if self.targets is None:
            for restart in range(self.restarts):
                self._run(solver, x, y, y, f"{restart}", seed, record)
            return
        with torch.no_grad():
            logits = solver.victim(x)
        # An image that is wrong as it is needs no perturbation.
        record.is_adversarial.copy_(solver.fallen(torch.zeros_like(x), x, logits, y))
        solver = dataclasses.replace(solver, loss=solver.loss.model_copy(update={"targeted": True}))
        task, own = solver.task, solver.task.indexable(y).unsqueeze(1)
        order = logits.scatter(1, own, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : min(self.targets, logits.shape[1] - 1)]
        for restart in range(self.restarts):
            tried = order
            if self.probe_steps is not None:
                brief = self.model_copy(update={"steps": self.probe_steps})
                reached = [
                    brief._run(solver, x, task.targets(target, y), y, f"{restart}/scout/{rank}", seed, record)
                    for rank, target in enumerate(order.unbind(1))
                ]
                nearest = torch.stack(reached, 1).argsort(dim=1, descending=True, stable=True)
                chosen = nearest[:, : self.targets_kept].reshape(len(x), -1, *[1] * (order.ndim - 2))
                tried = order.gather(1, chosen.expand(-1, -1, *order.shape[2:]))
            for rank, target in enumerate(tried.unbind(1)):
                self._run(solver, x, task.targets(target, y), y, f"{restart}/{rank}", seed, record)

    def _run(
        self,
        solver: ProjectedGradient,
        x: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        name: str,
        seed: int,
        record: BestSoFar,
    ) -> torch.Tensor:
        """Run once, from a random start, on every active image; return the highest loss of each (N,)."""
        # Drawn for the whole batch, so that an image's draw does not depend on which others are active.
        start = solver.start(x, len(x), "uniform", self.start_size, generator(seed, "start", name, device=x.device))
        reached = x.new_full((len(x),), -torch.inf)
        rows = (
            (~record.is_adversarial).nonzero().flatten() if self.early_stop else torch.arange(len(x), device=x.device)
        )
        if len(rows) == 0:
            return reached
        state = self._ascend(solver, rows, x[rows], labels[rows], truth[rows], start[rows], record)
        reached[state.rows] = state.best_value
        return reached

    def _ascend(
        self,
        solver: ProjectedGradient,
        rows: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        delta: torch.Tensor,
        record: BestSoFar,
    ) -> State:
        """Ascend from ``delta``, stage by stage; return the state of the images that are not adversarial yet."""
        left = self.steps
        for radius, portion in zip(self.radii[:-1], self.portions, strict=False):
            steps = min(round(portion * self.steps), left - 1)
            if steps < 1:
                continue
            most = 1.0 if self.norm == "inf" else math.inf  # a wider ball is the box
            wide = self._stage(left < self.steps, steps=steps, eps=min(most, self.eps * radius), early_stop=False)
            # What is found outside the ball of eps is no result, and nothing is adversarial there.
            scratch = BestSoFar.into(torch.zeros_like(images))
            place = torch.arange(len(rows), device=rows.device)
            outer = dataclasses.replace(solver, ball=wide.ball)
            delta = outer.project(delta, images)
            state = wide._climb(outer, place, images, labels, truth, delta, scratch)
            delta, left = wide._handed_on(state, scratch), left - steps
        last = self
        if left < self.steps or self.start_size > 1:
            last, delta = self._stage(True, steps=left), solver.project(delta, images)
        return last._climb(solver, rows, images, labels, truth, delta, record)

    def _stage(self, later: bool, **settings: Any) -> AutoPGD:
        return self.model_copy(update=settings)

    def _handed_on(self, state: State, record: BestSoFar) -> torch.Tensor:
        """Return where the next stage starts."""
        return state.best

    def _climb(
        self,
        solver: ProjectedGradient,
        rows: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        delta: torch.Tensor,
        record: BestSoFar,
    ) -> State:
        state, last = self._begin(solver, rows, images, labels, truth, delta, record), 0
        for step in range(1, self.steps + 1):
            if len(state.rows) == 0:
                break
            if step > 1 and step - 1 in self.checkpoints:
                state, last = state.at_checkpoint(step - 1 - last, self.rho), step - 1
            state = self._step(solver, state, step, record)
        return state

    def _begin(
        self,
        solver: ProjectedGradient,
        rows: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor,
        delta: torch.Tensor,
        record: BestSoFar,
    ) -> State:
        gradient, logits = solver.gradient(delta, images, labels, truth=self._measure(truth), number=1)
        warn_of_fallback(solver.loss, logits.shape[1])
        value = self._judge(solver)(logits, labels, solver.task, self._measure(truth))
        state = State(
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
        return self._note(solver, self._extended(state), logits, record)

    def _extended(self, state: State) -> State:
        """Add the extra state of a variant."""
        return state

    def _step(self, solver: ProjectedGradient, now: State, step: int, record: BestSoFar) -> State:
        delta = self._move(solver, now)
        if step > 1 and self.inertia < 1:
            mixed = now.delta + self.inertia * (delta - now.delta) + (1 - self.inertia) * (now.delta - now.before)
            delta = solver.project(mixed, now.images)
        truth = self._measure(now.truth)
        if step == self.steps:  # the last step needs no gradient
            judge = dataclasses.replace(solver, loss=self._judge(solver))
            value, logits = judge.losses(delta, now.images, now.labels, truth=truth)
            return self._note(solver, now.after_step(delta, now.gradient, value), logits, record)
        guide = solver.at(step + 1, self.steps)
        gradient, logits = guide.gradient(delta, now.images, now.labels, truth=truth, number=step + 1)
        value = self._judge(solver)(logits, now.labels, solver.task, truth)
        return self._note(solver, now.after_step(delta, gradient, value), logits, record)

    def _move(self, solver: ProjectedGradient, now: State) -> torch.Tensor:
        return solver.step_along(now.delta, now.images, now.gradient, now.length.view(-1, 1, 1, 1))

    def _note(self, solver: ProjectedGradient, state: State, logits: torch.Tensor, record: BestSoFar) -> State:
        down = solver.fallen(state.delta, state.images, logits, state.truth, targeted=self.reaches)
        judged = self._judge(solver) is solver.loss
        record.note(state.rows, state.delta, state.value if judged else solver.harm(logits, state.labels), down)
        return state.only(~down) if self.early_stop and bool(down.any()) else state

    def _judge(self, solver: ProjectedGradient) -> Loss:
        """Return the loss that decides on step sizes and restarts: the cross-entropy for one that ranks nothing."""
        return Loss(targeted=solver.loss.targeted) if solver.loss.kind in MASKED else solver.loss

    def _measure(self, truth: torch.Tensor) -> torch.Tensor | None:
        """Return the true labels if a targeted loss needs them."""
        return None if self.targets is None else truth


@register("auto-pgd-targeted", source="Croce and Hein 2020, section 5", cost="as `auto-pgd`, per target")
class TargetedAutoPGD(AutoPGD):
    """APGD-T (Croce and Hein 2020, section 5): the targeted ratio, towards the nine likeliest wrong classes in turn."""

    loss: LossName = "dlr"
    targets: Annotated[int, Field(ge=1)] | None = 9


_DENSER = 1.5
"""A step changes as many values as the best point, divided by this (algorithm 1)."""
_FEWER = 0.95
"""The best point has become sparser if it changes less than this share of the values it changed before."""
_SHORTER = 1.5
_SHORTEST = 10.0


@register("l1-auto-pgd", source="Croce and Hein 2021", cost="as `auto-pgd`")
class L1AutoPGD(AutoPGD):
    """l1-APGD (Croce and Hein 2021, section 4, algorithm 1): adaptive sparsity and step size, exact projection.

    A step changes a share of the values, those with the largest gradients, equally, and projects onto ball and box
    jointly. Every 4 % of the steps the share is set to that of the best point, divided by 1.5. If the best point has
    become sparser by 5 %, the run continues from it with full step size; otherwise the step size is divided by 1.5,
    down to a tenth. There is no momentum. ``radii`` is the paper's multi-eps form. Costs are those of Auto-PGD, plus
    one forward per radius after the first.
    """

    norm: Norm = "1"
    """Only the norm 1."""
    exact_box: bool = True
    """Skip values that are at the box, so that a sparse step is not spent on them (ours: the published form does not
    move if the largest gradients point out of the box). False: as published."""
    inertia: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """1: no momentum, as in the authors' code."""
    share: Annotated[Number, Field(gt=0, le=1)] | None = 0.2
    """Share of values that the first steps change: the paper's 0.2. None: as many as the start changes, divided by 1.5,
    as every stage after the first does."""
    radii: tuple[Annotated[Number, Field(ge=1)], ...] = (3.0, 2.0, 1.0)
    portions: tuple[Annotated[Number, Field(gt=0)], ...] = (0.3, 0.3, 0.4)

    @model_validator(mode="after")
    def _check_norm(self) -> L1AutoPGD:
        if self.norm != "1":
            raise ValueError(f"this attack is for norm '1', and the norm is {self.norm!r}; use AutoPGD for others")
        if self.sparsity is not None:
            raise ValueError("this attack adapts the sparsity of its steps; set share, the initial sparsity, instead")
        return self

    @property
    def checkpoints(self) -> list[int]:
        """Checkpoints for sparsity and step sizes: every 4 % of the steps."""
        return list(range(0, self.steps, max(1, math.floor(0.04 * self.steps + 1e-9))))[1:]

    def _stage(self, later: bool, **settings: Any) -> AutoPGD:
        return super()._stage(later, **settings, **({"share": None} if later else {}))

    def _extended(self, state: State) -> State:
        changed, size = _changed(state.delta), state.delta[0].numel()
        moved = changed / _DENSER if self.share is None else torch.full_like(changed, self.share * size)
        before = changed if self.share is None else torch.full_like(changed, size)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return SparseState(**fields, moved=moved, changed=before, longest=state.length)

    def _move(self, solver: ProjectedGradient, now: State) -> torch.Tensor:
        assert isinstance(now, SparseState)
        input_gradient = now.gradient.flatten(1)
        if self.exact_box:
            room = torch.where(now.gradient > 0, 1 - now.images - now.delta, now.images + now.delta)
            input_gradient = input_gradient.masked_fill(room.flatten(1) <= 0, 0)
        size = input_gradient.abs()
        last = now.moved.long().clamp(1, size.shape[1]) - 1
        least = size.sort(dim=1, descending=True).values.gather(1, last.unsqueeze(1))
        signs = input_gradient.sign() * (size >= least)
        move = now.length.unsqueeze(1) * signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
        return solver.project(now.delta + move.view_as(now.delta), now.images)


@dataclass(frozen=True, kw_only=True)
class SparseState(State):
    """State with the sparsity of the steps per image."""

    moved: torch.Tensor
    """Number of values a step changes."""
    changed: torch.Tensor
    """Number of values the best point changed at the last checkpoint."""
    longest: torch.Tensor
    """Initial step size, pixel units."""

    def at_checkpoint(self, steps: int, rho: float) -> SparseState:
        """Update sparsity and step size (algorithm 1); the arguments are not used."""
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
