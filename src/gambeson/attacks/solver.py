"""The solver of all gradient attacks: projected gradient ascent in a ball; and Adam for perturbations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from gambeson.attacks.losses import Loss
from gambeson.base import UserError, full_precision
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat import Ball, BoxGradient, perturb
from gambeson.victim import AveragedVictim, Victim


@dataclass
class Adam:
    """Adam for a tensor with one row per image (Kingma and Ba 2015, algorithm 1); rows can be dropped (:meth:`of`)."""

    mean: torch.Tensor
    square: torch.Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    count: int = 0

    @classmethod
    def like(cls, tensor: torch.Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> Adam:
        """Return the initial moments."""
        return cls(torch.zeros_like(tensor), torch.zeros_like(tensor), betas)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Update the moments with a gradient; return the step at a learning rate of one."""
        one, two = self.betas
        self.count += 1
        self.mean = one * self.mean + (1 - one) * gradient
        self.square = two * self.square + (1 - two) * gradient.square()
        mean, square = self.mean / (1 - one**self.count), self.square / (1 - two**self.count)
        return mean / (square.sqrt() + 1e-8)

    def of(self, rows: torch.Tensor) -> Adam:
        """The moments of some images."""
        return Adam(self.mean[rows], self.square[rows], self.betas, self.count)


NON_FINITE = (
    "if its outputs are finite, look for a square root, a norm or a division at zero, as of pixels that are all equal, "
    "and add a small number there; else check its weights"
)
"""What to do about a gradient that is NaN or infinite."""


class GradientWarning(UserWarning):
    """A gradient that no attack can follow."""


class NonFiniteGradientError(UserError):
    """The model's gradient is NaN or infinite.

    Attributes:
        found: (N, C, H, W), the best images so far if the attack keeps them; else None.
    """

    found: torch.Tensor | None = None


def input_gradient(victim: Victim, value: torch.Tensor, point: torch.Tensor, images: int) -> torch.Tensor:
    """Return the gradient of a scalar at ``point``, counted as one backward pass of ``images`` images.

    Raises:
        NonFiniteGradientError: it is not finite.
    """
    gradient = victim.gradient(value, point, images)
    require_finite([gradient.sum()])
    return gradient


def warn_of_zero_gradient() -> None:
    """Warn that a gradient is exactly zero, which no attack can follow."""
    warnings.warn(
        "the model's gradient was exactly zero, so that the attack could not follow it: what it left right is no sign "
        "of robustness; look for rounding, thresholds, saturated outputs and a loss truncated below that of every "
        "answer, and see gambeson audit",
        GradientWarning,
        stacklevel=3,
    )


def require_finite(
    sums: Sequence[torch.Tensor], first: int | None = None, *, done: Callable[[], bool] = lambda: False
) -> None:
    """Refuse gradients that are NaN or infinite, and warn of gradients that are all zero, waiting for the device once.

    Args:
        sums: the sum of each step's gradient, scalars.
        first: number of the first of these steps, for the message.
        done: asked where they are all zero: whether that is as it should be, as that of a truncated loss is where
            every answer has reached its goal.

    Raises:
        NonFiniteGradientError: some are.
    """
    if not sums:
        return
    values = torch.stack(list(sums)).tolist()
    if not any(values) and not done():
        warn_of_zero_gradient()
    finite = [math.isfinite(value) for value in values]
    if not all(finite):
        where = "" if first is None else f" at step {first + finite.index(False)}"
        raise NonFiniteGradientError(
            f"the model's gradient is NaN or infinite{where}: no attack can follow it; {NON_FINITE}"
        )


def cosine(steps: int, first: float, last: float) -> list[float]:
    """Return a cosine schedule of ``steps`` lengths from the first to the last."""
    waves = [(1 + math.cos(math.pi * k / max(1, steps - 1))) / 2 for k in range(steps)]
    return [last + (first - last) * wave for wave in waves]


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient:
    """Projected gradient ascent in a ball, on one victim, for one loss."""

    victim: Victim
    ball: Ball
    loss: Loss
    per_image: bool = False
    """Each image has its own perturbation, which is then projected onto the box too. A shared one is not: a value that
    saturates one image still changes the others."""
    box_gradient: BoxGradient = "exact"
    task: Task = CLASSIFICATION
    """What the labels mean."""
    exact_box: bool = False
    """Per image only: project onto ball and box jointly (:meth:`gambeson.threat.Ball.project_in_box`) instead of one
    after the other. The same in the norm inf; always on in the norm 1."""
    sparsity: float | None = None
    """Norm 1 only: the share of values a step moves; see :meth:`gambeson.threat.Ball.step_in_box`."""
    sizes: torch.Tensor | None = None
    """(R, 1, 1, 1): radius of each perturbation as a share of eps, which also scales its start and its steps; in the
    norm inf also (1, C, H, W), of each value (:meth:`within`). None: eps for all."""
    carry: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Shared only: puts perturbations (R, C, h, w) on images (N, C, H, W), differentiably, such as a patch; None: they
    are added and clipped (:func:`gambeson.threat.perturb`)."""
    place: tuple[int, int] = (0, 1)
    """Rank and world size; each process draws for all and takes its own part, so that several processes start as a
    single one would."""

    def start(
        self,
        images: torch.Tensor,
        rows: int,
        kind: str,
        size: float,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return ``rows`` starting points: ``zero``, ``uniform`` in the ball, or random ``sign``s.

        Args:
            images: (N, C, H, W), for shape, dtype and device.
            rows: number of perturbations.
            kind: the kind of start.
            size: radius of the start as a share of eps.
            generator: on the images' device.
        """
        number, processes = self.place
        if kind == "zero":
            return images.new_zeros((rows, *images.shape[1:]))
        draw = self.ball.uniform if kind == "uniform" else self.ball.signs
        drawn = draw((processes * rows, *images.shape[1:]), generator).unflatten(0, (processes, rows))[number]
        return self._hold(drawn.to(images.dtype) * self.scaled(size), images)

    def within(self, shrink: float, images: torch.Tensor, generator: torch.Generator) -> ProjectedGradient:
        """Return the solver in a box inside the ball of norm inf: half-widths are drawn from [1 - shrink, 1] eps.

        Args:
            shrink: what a value's half-width loses at the most, as a share of eps.
            images: (N, C, H, W), for shape and device; all have the same box.
            generator: on the images' device.
        """
        drawn = torch.rand((1, *images.shape[1:]), generator=generator, device=images.device)
        return replace(self, sizes=1 - shrink * drawn)

    def scaled(self, length: float | torch.Tensor) -> float | torch.Tensor:
        """Scale a length, or a share, to the size of each perturbation's ball."""
        return length if self.sizes is None else length * self.sizes

    def step(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        length: float,
        sums: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step of ``length`` (pixel units) up the loss.

        Args:
            delta: (R, C, H, W) with R a divisor of N.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) or (N, H, W); targets where the loss is targeted.
            length: norm of the step, in pixel units.
            sums: see :meth:`gradient`.

        Returns:
            The new delta, inside the ball, and the logits before the step.

        Raises:
            NonFiniteGradientError: the gradient is not finite.
        """
        gradient, logits = self.gradient(delta, images, labels, sums=sums)
        return self.step_along(delta, images, gradient, length), logits

    def gradient(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        truth: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        view: Callable[[torch.Tensor], torch.Tensor] | None = None,
        number: int | None = None,
        sums: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of the loss with respect to ``delta``, and the logits: one forward, one backward.

        Args:
            delta: (R, C, H, W) with R a divisor of N.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) or (N, H, W); targets where the loss is targeted.
            truth: true labels, for a targeted loss that needs them.
            weights: of every label in the loss, in their shape; None: all 1.
            view: differentiable transform of the perturbed images before the model.
            number: of the step, counted from 1, for the error message.
            sums: the gradient's sum is appended, for :func:`require_finite` after the last step; None checks now, which
                waits for the device.

        Raises:
            NonFiniteGradientError: the gradient is not finite.
        """
        # The weights of segpgd, and where a patch lies, change with every step.
        if view is None and truth is None and self.carry is None and self.loss.kind != "segpgd":
            made = (self.loss, self.task, self.per_image, self.box_gradient)
            more = () if weights is None else (weights,)
            gradient, logits, total = self.victim.repeated(
                made, self._gradient, images, delta, labels, *more, by_row=self.per_image
            )
        else:
            gradient, logits, total = self._gradient(images, delta, labels, weights, truth, view)
        if sums is None:
            require_finite([total], number, done=partial(self.done, logits, labels))
        else:
            sums.append(total)
        return gradient, logits

    def _gradient(
        self,
        images: torch.Tensor,
        delta: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gradient, logits and the gradient's sum, without waiting for the device."""
        with torch.enable_grad():  # an attack called under no_grad still needs gradients
            if self.per_image:
                # The perturbed image is in the box, so no clip is needed: its gradient would be zero at pixels that are
                # exactly black or white (since torch 2.15), which can still move inwards.
                point = moved = perturb(images, delta).detach().requires_grad_()
            else:
                point = delta.detach().requires_grad_()
                moved = self.carry(images, point) if self.carry else perturb(images, point, self.box_gradient)
            logits, values = self.forward(moved if view is None else view(moved), labels, truth, weights)
            gradient = self.victim.gradient(values.sum(), point, len(images))
        return gradient, logits.detach(), gradient.sum()

    def losses(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        truth: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each image (N,) and the logits: one forward, without a gradient."""
        with torch.no_grad():
            logits, values = self.forward(perturb(images, delta), labels, truth)
        return values, logits

    def fallen(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        targeted: bool = False,
    ) -> torch.Tensor:
        """Return which images (N,) are adversarial at ``delta``, where their logits are these.

        Near its boundary a model answers otherwise in bfloat16 than in float32, in which it is scored: what has fallen
        by logits below float32 has to fall on the model itself, too, for a forward of these images alone.
        """
        down = self.task.is_adversarial(logits, labels, targeted=targeted)
        if self.victim.coarse and bool(down.any()):
            rows = down.nonzero().flatten()
            with torch.no_grad(), full_precision(images.device):
                sure = self.victim.forward_original(perturb(images[rows], delta[rows]))
            down[rows] = self.task.is_adversarial(sure, labels[rows], targeted=targeted)
        return down

    def at(self, step: int, steps: int) -> ProjectedGradient:
        """Return the solver for a step, counted from 1, of a loss that changes with it (:meth:`Loss.at`)."""
        loss = self.loss.at(step, steps)
        return self if loss is self.loss else replace(self, loss=loss)

    def harm(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of labels per image on which the attack has succeeded, (N,).

        A share below one, which grows with the cross-entropy (or, of targets, falls), makes ranks of equal numbers.
        """
        targeted = self.loss.targeted
        hits = self.task.units(self.task.succeeded(logits, labels, targeted=targeted)).sum(1)
        value = Loss(targeted=targeted)(logits, labels, self.task)
        return hits + (1 / (1 - value) if targeted else value / (1 + value))

    def step_along(
        self, delta: torch.Tensor, images: torch.Tensor, gradient: torch.Tensor, length: float | torch.Tensor
    ) -> torch.Tensor:
        """Return ``delta`` after a step of ``length`` (pixel units; a number or (R, 1, 1, 1)) up ``gradient``.

        With ``sizes``, the length is that for a radius of eps.
        """
        length = self.scaled(length)
        if self._at_once:
            room = torch.where(gradient > 0, 1 - images - delta, images + delta).clamp(min=0)
            moved = delta.detach() + self.ball.step_in_box(gradient, length, room, self.sparsity)
        else:
            moved = delta.detach() + length * self.ball.steepest(gradient)
        return self.project(moved, images)

    def project(self, delta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Project onto the ball and, for per-image perturbations, onto the box."""
        if self._at_once:
            return self.ball.project_in_box(delta, -images, 1 - images, self.sizes)
        return self._hold(self.ball.project(delta, self.sizes), images)

    def run(
        self,
        delta: torch.Tensor,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        lengths: Iterable[float],
    ) -> torch.Tensor:
        """Take one step per length, each on the next batch; return the last delta."""
        sums: list[torch.Tensor] = []
        done: Callable[[], bool] = lambda: False  # noqa: E731
        for (images, labels), length in zip(batches, lengths, strict=False):
            delta, logits = self.step(delta, images, labels, length, sums)
            done = partial(self.done, logits, labels)
        require_finite(sums, done=done)
        return delta

    def done(self, logits: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether a gradient of zero is the loss's own: every answer is at its goal, or ``js`` at its start."""
        if not self.loss.may_vanish or self.loss.kind == "js":
            return self.loss.may_vanish
        return bool(self.task.is_adversarial(logits, labels, targeted=self.loss.targeted).all())

    def forward(
        self,
        moved: torch.Tensor,
        labels: torch.Tensor,
        truth: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of perturbed images, and the loss of each (N,)."""
        if not (isinstance(self.victim, AveragedVictim) and self.victim.average == "losses"):
            logits = self.victim(moved)
            return logits, self.loss(logits, labels, self.task, truth, weights)
        each = self.victim.each(moved)
        values = torch.stack([self.loss(logits, labels, self.task, truth, weights) for logits in each])
        return self.victim.combine(each), values.mean(0)

    @property
    def _at_once(self) -> bool:
        # In the norm inf the two are the same.
        return self.per_image and (self.ball.norm == "1" or (self.ball.norm == "2" and self.exact_box))

    def _hold(self, delta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(delta, -images), 1 - images) if self.per_image else delta
