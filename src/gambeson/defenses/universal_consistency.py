"""Universal consistency (ours): predictions that a bank of persistent perturbations does not change; and the bank."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Number, average, generator
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, SharedForward, TrainContext
from gambeson.defenses.registry import register
from gambeson.threat import Ball, BoxGradient, Eps, Norm, perturb
from gambeson.victim import Victim

BankStart = Literal["zero", "uniform", "sign"]
"""Initial perturbation: zero, uniform in the ball, or random signs on its surface."""

Ascend = Literal["steepest", "normalised"]
"""Step direction: ``steepest`` in the norm (the gradient's sign in the norm inf), or along the
``normalised`` gradient, scaled to a step of the same norm. The two differ in the norm inf only."""

_MEMORY = 0.9  # decay of the strength per step


class UAPBank(nn.Module):
    """K perturbations inside a ball, stored in a buffer, each updated by the rows of a batch assigned to it.

    The perturbations enter the graph of the training loss as one leaf, so that one backward computes the gradients of
    the weights and of the perturbations. The step size does not depend on the weight of the loss.

    Args:
        context: of the objective.
        count: number of perturbations K.
        ball: the ball of the perturbations.
        rel_step_size: step size as a share of eps.
        start: initial perturbations.
        ascend: step direction.
        box_gradient: how the clip of the images to [0, 1] is differentiated.

    Attributes:
        delta: (K, C, H, W), in pixel units.
        strength: (K,), running mean of the value of a row under each; zero until known.
    """

    delta: torch.Tensor
    strength: torch.Tensor

    def __init__(
        self,
        context: TrainContext,
        *,
        count: int,
        ball: Ball,
        rel_step_size: float,
        start: BankStart = "uniform",
        ascend: Ascend = "steepest",
        box_gradient: BoxGradient = "exact",
    ) -> None:
        super().__init__()
        self.ball, self.length, self.ascend = ball, rel_step_size * ball.eps, ascend
        self.box_gradient: BoxGradient = box_gradient
        shape = (count, *context.train.shape)
        self.register_buffer("delta", self._drawn(shape, start, generator(context.seed, "pool")))
        self.register_buffer("strength", torch.zeros(count))
        self._leaf: torch.Tensor | None = None

    def perturb(self, images: torch.Tensor, rows: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return clip(images + scale * delta[rows], 0, 1), with a graph to the perturbations.

        Args:
            images: (N, C, H, W) in [0, 1].
            rows: (N,), the index of each image's perturbation.
            scale: of the perturbations.
        """
        if self._leaf is None:
            self._leaf = self.delta.detach().requires_grad_()
        delta = self._leaf if scale == 1 else scale * self._leaf
        # Indexing sums each perturbation's gradient in a fixed order on every device; index_select does not.
        return perturb(images, delta if len(delta) == 1 else delta[rows], self.box_gradient)

    def maximise(self, model: nn.Module, batch: Batch, rows: torch.Tensor, loss: Loss) -> None:
        """Take one step up ``loss`` on a batch, with a separate forward and backward.

        The model is in evaluation mode, without parameter gradients.
        """
        shared = len(self.delta) == 1
        with Victim(model) as victim:
            solver = ProjectedGradient(
                victim=victim,
                ball=self.ball,
                loss=loss,
                box_gradient=self.box_gradient,
                task=batch.task,
            )
            gradient, _ = solver.gradient(self.delta if shared else self.delta[rows], batch.images, batch.labels)
        if not shared:
            gradient = torch.zeros_like(self.delta).index_put_((rows,), gradient, accumulate=True)
        self._move(gradient)

    def after_step(self) -> None:
        """Take one step along the gradient of the last backward, or of several of this batch; without one, none."""
        leaf, self._leaf = self._leaf, None
        if leaf is not None and leaf.grad is not None:
            self._move(leaf.grad)

    @torch.no_grad()
    def note(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Update ``strength`` with the mean of ``values`` (N,) for each perturbation, over all processes."""
        sums, counts = torch.zeros_like(self.strength), torch.zeros_like(self.strength)
        sums.index_put_((rows,), values.detach().float(), accumulate=True)
        counts.index_put_((rows,), torch.ones_like(values, dtype=torch.float32), accumulate=True)
        average([sums, counts])
        means = sums / counts.where(counts > 0, 1)
        known = torch.where(self.strength > 0, _MEMORY * self.strength + (1 - _MEMORY) * means, means)
        self.strength = torch.where(counts > 0, known, self.strength)

    @torch.no_grad()
    def replace_weakest(self, seed: int) -> None:
        """Redraw the perturbation of least strength uniformly; its strength is then unknown."""
        weakest = torch.nn.functional.one_hot(self.strength.argmin(), len(self.delta)).bool()
        fresh = self._drawn((1, *self.delta.shape[1:]), "uniform", generator(seed, "pool")).to(self.delta)
        self.delta = torch.where(weakest.view(-1, 1, 1, 1), fresh, self.delta)
        self.strength = self.strength.masked_fill(weakest, 0)

    @torch.no_grad()
    def _move(self, gradient: torch.Tensor) -> None:
        average([gradient])
        steepest = self.ball.steepest(gradient)
        if self.ascend == "normalised":
            size = self.ball.length(gradient).view(-1, 1, 1, 1)
            steepest = torch.where(size > 0, gradient / size.where(size > 0, 1), 0)
        self.delta = self.ball.project(self.delta + self.length * steepest)

    def _drawn(self, shape: tuple[int, ...], start: BankStart, draw: torch.Generator) -> torch.Tensor:
        if start == "zero":
            return torch.zeros(shape)
        return (self.ball.uniform if start == "uniform" else self.ball.signs)(shape, draw)


def mute(moved: torch.Tensor, keep: torch.Tensor) -> None:
    """Exclude some images from the perturbations' step, but not from the weights'.

    Args:
        moved: (N, C, H, W), the result of :meth:`UAPBank.perturb`, before its backward.
        keep: (N,), whether an image is included.
    """
    if moved.requires_grad:
        moved.register_hook(lambda gradient: gradient * keep.view(-1, 1, 1, 1).to(gradient))


Assignment = Literal["even", "random", "strong"]
"""Assignment of perturbations to images: ``even`` gives each the same number of images of the shuffled batch,
``random`` draws one per image, ``strong`` draws those with a recently larger term more often."""

Direction = Literal["forward", "reverse"]
"""``forward`` is KL(clean prediction, perturbed prediction), as in TRADES; ``reverse`` swaps the two."""


@register("universal-consistency", source="ours", cost="2 / 2 in one pass")
class UniversalConsistency(Defense):
    """Minimise E[CE(f(x), y)] + beta * E[KL(f(x), f(x + delta_k))] over a bank of perturbations that maximise it.

    Every image of a batch is assigned one of K perturbations, which persist for the whole training. Clean and perturbed
    images share one forward (and BatchNorm statistics), and one backward computes the gradients of weights and
    perturbations, so a step costs two plain ones for any K.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    bank: Annotated[int, Field(ge=1)] = 8
    """Number K of perturbations."""
    beta: Annotated[Number, Field(ge=0)] = 4.0
    """Weight of the consistency; 0 is standard training."""
    warmup: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Share of the training over which the weight rises linearly from zero."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Step size of a perturbation as a share of eps."""
    assignment: Assignment = "even"
    direction: Direction = "forward"
    detach_clean: bool = False
    """Detach the clean prediction in the consistency term."""
    truncate: Number | None = None
    """Images whose cross-entropy under their perturbation is above this are excluded from the perturbation's step, but
    not from the weights'."""
    restart: Annotated[int, Field(ge=0)] = 0
    """Redraw the weakest perturbation every so many steps; 0: never."""
    start: BankStart = "uniform"
    box_gradient: BoxGradient = "exact"
    """How the clip of the perturbed images is differentiated: see :data:`gambeson.threat.BoxGradient`."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective with its initial bank."""
        bank = UAPBank(
            context,
            count=self.bank,
            ball=Ball(eps=self.eps, norm=self.norm),
            rel_step_size=self.rel_step_size,
            start=self.start,
            box_gradient=self.box_gradient,
        )
        term = BankConsistency(bank, self)
        return SharedForward({"clean": (1.0, Clean()), "consistency": (term.strain, term)})


class BankConsistency(nn.Module):
    """Mean divergence between the predictions on clean images and on images under the bank's perturbations.

    Args:
        bank: the perturbations.
        settings: of the defence.
    """

    def __init__(self, bank: UAPBank, settings: UniversalConsistency) -> None:
        super().__init__()
        self.bank, self.settings = bank, settings
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def strain(self, batch: Batch) -> float:
        """The weight at this point of the training."""
        warmup = self.settings.warmup
        return self.settings.beta * (min(1.0, batch.progress / warmup) if warmup else 1.0)

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean divergence, with a graph to the parameters and the perturbations."""
        return self.with_logits(model, batch)[1]

    def with_logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Also return the clean logits, for the clean term."""
        rows = self.rows(batch)
        moved = self.moved(model, batch, rows)
        clean, perturbed = batch.forward(model, torch.cat([batch.images, moved])).tensor_split(2)
        if self.settings.truncate is not None:
            mute(moved, batch.losses(perturbed.detach()) <= self.settings.truncate)
        fixed = clean.detach() if self.settings.detach_clean else clean
        apart = divergence(fixed, perturbed, self.settings.direction)
        values = batch.task.per_image(apart, batch.labels)
        self._seen.append((rows, values.detach()))
        return clean, values.mean()

    def moved(self, model: nn.Module, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """Return the images under their perturbations, with a graph to these."""
        return self.bank.perturb(batch.images, rows)

    def rows(self, batch: Batch) -> torch.Tensor:
        """Return the index of each image's perturbation, (N,)."""
        count, device = len(self.bank.delta), batch.images.device
        number, processes = batch.place
        own = len(batch.images)
        if self.settings.assignment == "even":
            return torch.arange(number * own, number * own + own, device=device) % count
        odds = torch.ones(count, device=device)
        if self.settings.assignment == "strong":
            # Unknown strengths count as the highest.
            known = self.bank.strength.to(device)
            odds = torch.where(known > 0, known, known.max().clamp(min=1e-6))
        draw = generator(batch.seed, "pool", device=device)
        return batch.mine(torch.multinomial(odds, processes * own, replacement=True, generator=draw))

    def after_step(self, batch: Batch) -> None:
        """Update the perturbations and their strengths, and redraw the weakest one when due."""
        seen, self._seen = self._seen, []
        self.bank.after_step()
        if seen:
            self.bank.note(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        if self.settings.restart and (batch.step + 1) % self.settings.restart == 0:
            self.bank.replace_weakest(batch.seed)


def divergence(clean: torch.Tensor, perturbed: torch.Tensor, direction: Direction = "forward") -> torch.Tensor:
    """Kullback-Leibler divergence between two predictions, one value per prediction.

    Args:
        clean: logits (N, K) or (N, K, H, W).
        perturbed: logits of the same shape.
        direction: see :data:`Direction`.

    Returns:
        (N,) or (N, H, W), in nats.
    """
    p, q = clean.float().log_softmax(1), perturbed.float().log_softmax(1)
    if direction == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum(1)
