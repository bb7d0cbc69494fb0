"""Base class of per-image gradient attacks, and how the options of transfer attacks bend their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from gambeson.attacks.gradient.transfer import Diversity, Noise, Scales, Smoothing
from gambeson.attacks.losses import Loss, LossName
from gambeson.attacks.solver import NonFiniteGradientError, ProjectedGradient
from gambeson.base import Config, Number, UserError, seeded
from gambeson.tasks import Task, as_pair
from gambeson.tasks import of as task_of
from gambeson.threat import Ball, Eps, Norm, landed, perturb
from gambeson.victim import Average, Source, Victim, as_victim

_TINY = 1e-12
View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The transfer options of an attack; with all of them off, steps are bit-identical to those along the gradient."""

    solver: ProjectedGradient
    momentum: float = 0.0
    nesterov: bool = False
    diversity: Diversity | None = None
    smoothing: Smoothing | None = None
    scales: Scales | None = None
    noise: Noise | None = None

    @property
    def sees_images(self) -> bool:
        """Whether the logits are those of the perturbed images themselves."""
        return self.diversity is None and self.noise is None and not self.nesterov

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """Draw the random numbers of one step, for all images, so that they do not depend on which ones are active."""
        noisy = [] if self.noise is None else self.noise.draw(images, generator)
        if self.diversity is None:
            return noisy
        copies = max(1, len(noisy)) * (1 if self.scales is None else self.scales.copies)
        return noisy + [self.diversity.draw(images, generator) for _ in range(copies)]

    def gradient(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        velocity: torch.Tensor,
        length: float,
        drawn: list[torch.Tensor],
        number: int | None = None,
        sums: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the direction, the new velocity, and the logits of the first forward.

        Args:
            delta: (N, C, H, W).
            images: (N, C, H, W).
            labels: (N,) or (N, H, W).
            velocity: (N, C, H, W); at the first step zero, (N, 1, 1, 1).
            length: of the next step, in pixel units.
            drawn: the rows of :meth:`draw` for these images.
            number: of the step, counted from 1.
            sums: see :meth:`ProjectedGradient.gradient`; one per step.
        """
        point = delta
        if self.nesterov:  # projected onto the box; clipping would remove the gradient of values beyond it
            ahead = delta + self.solver.scaled(length) * self.momentum * velocity
            point = torch.minimum(torch.maximum(ahead, -images), 1 - images)
        views = self._views(drawn)
        several: list[torch.Tensor] | None = None if sums is None else []
        gradient, first = self.solver.gradient(point, images, labels, view=views[0], number=number, sums=several)
        for view in views[1:]:
            gradient = gradient + self.solver.gradient(point, images, labels, view=view, number=number, sums=several)[0]
        if sums is not None and several:
            sums.append(torch.stack(several).sum())
        if len(views) > 1:
            gradient = gradient / len(views)
        if self.smoothing is not None:
            gradient = self.smoothing(gradient)
        if self.momentum == 0:
            return gradient, velocity, first
        velocity = self.momentum * velocity + self._unit(gradient)
        return velocity, velocity, first

    def _views(self, drawn: list[torch.Tensor]) -> list[View | None]:
        views: list[View | None] = [None] if self.scales is None else self.scales.views()
        if self.noise is not None:
            size = self.noise.deviation(self.solver.ball, drawn[0].shape[1:])
            noisy, drawn = drawn[: self.noise.copies], drawn[self.noise.copies :]
            views = [_noisy(view, size * one) for one in noisy for view in views]
        if self.diversity is None:
            return views
        diversity = self.diversity
        return [_after(view, diversity, rows) for view, rows in zip(views, drawn, strict=True)]

    def _unit(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient scaled to the look-ahead of one step."""
        if self.solver.ball.norm == "inf":
            size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        else:
            size = self.solver.ball.length(gradient).view(-1, 1, 1, 1)
        return gradient / size.clamp(min=_TINY)


def _noisy(view: View | None, noise: torch.Tensor) -> View:
    return lambda images: images + noise if view is None else view(images + noise)


def _after(view: View | None, diversity: Diversity, drawn: torch.Tensor) -> View:
    return lambda images: diversity.view(images if view is None else view(images), drawn)


LabelChoice = Literal["truth", "prediction", "least-likely"]
"""Label used by an attack: the given one; the model's prediction on the clean image, which does not leak the truth into
training (Tramer et al. 2018, section 4.1); or its least likely class there, as a target (Kurakin et al. 2017). The
latter two cost one forward per image."""


@dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The best perturbation of each image of a batch: one that succeeds before one that does not, then by loss."""

    delta: torch.Tensor
    """(N, C, H, W); written in place."""
    value: torch.Tensor
    """(N,)"""
    is_adversarial: torch.Tensor
    """(N,)"""

    @classmethod
    def into(cls, delta: torch.Tensor) -> BestSoFar:
        """Return an empty record that writes its perturbations into ``delta``."""
        value = delta.new_full((len(delta),), -torch.inf)
        return cls(delta=delta, value=value, is_adversarial=torch.zeros_like(value, dtype=torch.bool))

    def note(self, rows: torch.Tensor, delta: torch.Tensor, value: torch.Tensor, is_adversarial: torch.Tensor) -> None:
        """Keep what is better than before for the images ``rows``."""
        old_value, was_adversarial = self.value[rows], self.is_adversarial[rows]
        better = (is_adversarial & ~was_adversarial) | ((is_adversarial == was_adversarial) & (value > old_value))
        chosen = better.view(-1, 1, 1, 1)
        self.delta[rows] = torch.where(chosen, delta, self.delta[rows])
        self.value[rows] = torch.where(better, value, old_value)
        self.is_adversarial[rows] = is_adversarial | was_adversarial


class GradientAttack(Config):
    """Base of the gradient attacks with one perturbation per image.

    Call it: ``attack(model, x, y)`` returns images of the shape, dtype and device of ``x``, inside the ball and
    inside [0, 1]. With several restarts the result per image is a successful perturbation, or else the one of highest
    loss.
    """

    gradients: ClassVar[bool] = True

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    """Norm of the ball and of the step."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Independent starts."""
    targeted: bool = False
    """Treat labels as targets."""
    label: LabelChoice = "truth"
    """The label to leave or to reach; ``least-likely`` is a target by itself."""
    loss: LossName = "cross-entropy"
    """The loss. ``dlr`` needs three classes, targeted four; with fewer classes the margin is used, with a warning (see
    :meth:`gambeson.attacks.Loss.used`)."""
    average: Average = "logits"
    """Average over several models."""
    exact_box: bool = True
    """Norm 2: project onto ball and box jointly, and spend no step on values that are at the box (after Croce and Hein
    2021, who do so in the norm 1); False projects onto the ball and then clips, the customary form, which wastes radius
    where images are black or white. The norm 1 always does so; in the norm inf the two are the same."""
    sparsity: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Norm 1 only: share of values that a step changes, each equally (SLIDE, Tramer and Boneh 2019, whose code uses
    0.01 for colour images); None moves value after value as far as the box allows, the steepest step."""
    eot_samples: Annotated[int, Field(ge=1)] | None = None
    """For a random model: samples that each gradient is averaged over (expectation over transformation, Athalye et al.
    2018); every step then costs that many times as much, and early stopping is off, because success on a few samples is
    not success. 1 uses a single sample. None: random models are refused."""
    early_stop: bool = True
    """Stop attacking an image once it is adversarial."""

    @model_validator(mode="after")
    def _check_labels(self) -> GradientAttack:
        if self.label == "prediction" and self.targeted:
            raise ValueError("the model's own prediction is no target to reach; use label='least-likely' or 'truth'")
        if self.sparsity is not None and self.norm != "1":
            raise ValueError(f"sparsity is for norm '1', and the norm is {self.norm!r}; leave it out")
        return self

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def reaches(self) -> bool:
        """Whether the attack has targets to reach instead of labels to leave."""
        return self.targeted or self.label == "least-likely"

    def __call__(
        self,
        model: Source,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
    ) -> torch.Tensor:
        """Attack a batch.

        Args:
            model: any module from pixels to logits, an entered :class:`Victim`, or a list of source models.
            x: (N, C, H, W) in [0, 1].
            y: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of every random draw.
            task: what the labels mean; by default the task that labels of this form belong to, where all count.

        Raises:
            UserError: images outside [0, 1], or a model and images that do not fit.
            NonFiniteGradientError: a gradient is NaN or infinite; its ``found`` holds the images found so far.
        """
        images, labels, task = as_pair(x, y, task, floats=True)
        self._check_task(task)
        if len(images) == 0:
            return images.clone()
        with (
            as_victim(
                model,
                images.float(),
                labels,
                task,
                fast=True,
                average=self.average,
                eot_samples=self.eot_samples,
                gradients=type(self).__name__,
            ) as victim,
            seeded(seed, "noise"),
        ):
            return self.perturb_batch(victim, images, labels, seed=seed, task=task)

    def perturb_batch(
        self,
        victim: Victim,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
        sizes: torch.Tensor | None = None,
        place: tuple[int, int] = (0, 1),
    ) -> torch.Tensor:
        """Attack a batch without inspecting model and images first, as training does in every step.

        A random model is used as it is, with torch's global generators.

        Args:
            victim: an entered victim.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of every random draw.
            task: what the labels mean; by default the task that labels of this form belong to, where all count.
            sizes: (N, 1, 1, 1), the radius of each image's ball as a share of eps, to which its start and its steps
                shrink too; for attacks of :class:`gambeson.attacks.PGD` without restarts and early stop.
            place: the number of this process and of how many; see :class:`gambeson.attacks.solver.ProjectedGradient`.

        Raises:
            UserError: the attack does not support ``sizes``.
            NonFiniteGradientError: a gradient is NaN or infinite; its ``found`` holds the images found so far.
        """
        if sizes is not None and not self._follows_sizes:
            raise UserError(
                f"{type(self).__name__} was given a radius for each image: expected a PGD attack with restarts=1 and "
                "early_stop=False; give one eps for all images"
            )
        pixels = images.float()
        task = task_of(labels) if task is None else task
        targets = self._labels(victim, pixels, labels, task)
        best = torch.zeros_like(pixels)
        patient = self if self.eot_samples is None else self.model_copy(update={"early_stop": False})
        solver = replace(self._ascent(victim, task), sizes=sizes, place=place)
        try:
            patient._search(solver, pixels, targets, seed, best)
        except NonFiniteGradientError as error:
            error.found = landed(images, perturb(images, best))
            raise
        return landed(images, perturb(images, best)).detach()

    def _check_task(self, task: Task) -> None:
        """Refuse a task that a setting does not suit, before anything is computed."""

    @property
    def _follows_sizes(self) -> bool:
        return False

    def _search(
        self, solver: ProjectedGradient, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor
    ) -> None:
        """Write the best perturbation of each image into ``best`` (N, C, H, W), which is zero."""
        raise NotImplementedError

    def _ascent(self, victim: Victim, task: Task) -> ProjectedGradient:
        return ProjectedGradient(
            victim=victim,
            ball=self.ball,
            loss=Loss(kind=self.loss, targeted=self.reaches),
            per_image=True,
            task=task,
            exact_box=self.exact_box,
            sparsity=self.sparsity,
        )

    def _labels(self, victim: Victim, images: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
        if self.label == "truth":
            return labels
        with torch.no_grad():
            logits = victim(images)
        chosen = logits.argmax(1) if self.label == "prediction" else logits.argmin(1)
        return task.targets(chosen, labels)
