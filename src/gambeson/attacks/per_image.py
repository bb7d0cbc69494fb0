"""What every gradient attack with one perturbation an image shares: its sources, labels, loss, ball and restarts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from gambeson.attacks.losses import Loss, LossName
from gambeson.attacks.solver import Ascent, NotFinite
from gambeson.attacks.sources import Average, Source, drawn, opened
from gambeson.base import Config, Number, UserError, seeded
from gambeson.base.checks import check_batch
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Victim

LabelChoice = Literal["truth", "prediction", "least-likely"]
"""Which label an attack works with: the one that is given; the model's own prediction on the clean image, which does
not leak the truth into training (Tramer et al. 2018, section 4.1); or the class that the model finds least likely
there, as a target to reach (Kurakin et al. 2017). The latter two cost one forward an image."""


class GradientAttack(Config):
    """Base of the gradient attacks with one perturbation an image.

    Call it: ``attack(model, x, y)`` returns images of the shape, dtype and device of ``x``, inside the ball and
    inside [0, 1]. Several restarts keep, for each image, a perturbation that succeeds, else the one with the
    highest loss.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    """Norm of the ball and of the step."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Independent starts."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    label: LabelChoice = "truth"
    """Which label to leave or to reach; ``least-likely`` is a target by itself."""
    loss: LossName = "cross-entropy"
    """What is climbed. ``dlr`` needs three classes, targeted four: on a model with fewer the margin is climbed, with
    a warning (see :meth:`gambeson.attacks.Loss.used`)."""
    average: Average = "logits"
    """What is averaged where several models are attacked at once."""
    exact_box: bool = True
    """Norm 2: project on ball and box at once and let no step be lost on values that stand at the box (after Croce and
    Hein 2021, who do so in the norm 1); False projects on the ball and then clips, the customary form, which wastes
    radius where images are black or white. The norm 1 always does it, and in the norm inf the two are the same."""
    sparsity: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Norm 1 only: the share of values that a step moves, each equally (SLIDE, Tramer and Boneh 2019, whose code
    takes 0.01 for colour images); None moves value after value as far as the box lets it, the steepest step."""
    draws: Annotated[int, Field(ge=1)] | None = None
    """For a random model: fresh draws over which each gradient is averaged (expectation over transformation, Athalye
    et al. 2018); every step then costs so many times as much, and no image is stopped at early, for falling in a few
    draws is not falling. 1 follows a single draw. None: the model has to repeat itself, and one that does not is
    refused."""
    early_stop: bool = True
    """Stop working on an image once it has fallen."""

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
        """Whether the attack has targets to reach, and not labels to leave."""
        return self.targeted or self.label == "least-likely"

    def __call__(
        self,
        model: Source,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        ignore_index: int | None = None,
    ) -> torch.Tensor:
        """Attack a batch.

        Args:
            model: any module from pixels to logits, a :class:`Victim` already entered, or a list of source models.
            x: (N, C, H, W) in [0, 1].
            y: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of every random draw.
            ignore_index: label that counts nowhere.

        Raises:
            UserError: images outside [0, 1], or a model and images that do not fit.
            NotFinite: a gradient is NaN or infinite; its ``found`` holds the images found until then.
        """
        images = check_batch(x, y)
        if len(images) == 0:
            return images.clone()
        with opened(model, self.average) as given, seeded(seed, "noise"):
            victim = drawn(given, images.float(), self.draws)
            return self.perturb_batch(victim, images, y, seed=seed, ignore_index=ignore_index)

    def perturb_batch(
        self,
        victim: Victim,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        seed: int = 0,
        ignore_index: int | None = None,
        sizes: torch.Tensor | None = None,
        place: tuple[int, int] = (0, 1),
    ) -> torch.Tensor:
        """Attack a batch without looking at model and images first: what training does step after step.

        A random model is followed as it answers, and torch's global generators are left to it.

        Args:
            victim: entered; it is climbed as it is.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of every random draw.
            ignore_index: label that counts nowhere.
            sizes: (N, 1, 1, 1), the radius of each image's ball as a share of eps, to which its start and its steps
                shrink too; for attacks of :class:`gambeson.attacks.PGD` without restarts and early stop.
            place: the number of this process and of how many; see :class:`gambeson.attacks.solver.Ascent`.

        Raises:
            UserError: the attack cannot follow ``sizes``.
            NotFinite: a gradient is NaN or infinite; its ``found`` holds the images found until then.
        """
        if sizes is not None and not self._follows_sizes:
            raise UserError(
                f"{type(self).__name__} was given a radius for each image: expected a PGD attack with restarts=1 and "
                "early_stop=False; give one eps for all images"
            )
        pixels = images.float()
        goals = self._labels(victim, pixels, labels, ignore_index)
        best = torch.zeros_like(pixels)
        patient = self if self.draws is None else self.model_copy(update={"early_stop": False})
        ascent = replace(self._ascent(victim, ignore_index), sizes=sizes, place=place)
        try:
            patient._search(ascent, pixels, goals, seed, best)
        except NotFinite as error:
            error.found = perturb(images, best.to(images.dtype))
            raise
        return perturb(images, best.to(images.dtype)).detach()

    @property
    def _follows_sizes(self) -> bool:
        return False

    def _search(self, ascent: Ascent, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor) -> None:
        """Write the best perturbation of each image into ``best`` (N, C, H, W), which is zero."""
        raise NotImplementedError

    def _ascent(self, victim: Victim, ignore_index: int | None) -> Ascent:
        return Ascent(
            victim=victim,
            ball=self.ball,
            loss=Loss(kind=self.loss, targeted=self.reaches),
            per_image=True,
            ignore_index=ignore_index,
            exact_box=self.exact_box,
            sparsity=self.sparsity,
        )

    def _labels(
        self, victim: Victim, images: torch.Tensor, labels: torch.Tensor, ignore_index: int | None
    ) -> torch.Tensor:
        if self.label == "truth":
            return labels
        with torch.no_grad():
            logits = victim(images)
        chosen = logits.argmax(1) if self.label == "prediction" else logits.argmin(1)
        return chosen if ignore_index is None else chosen.where(labels != ignore_index, labels)


def warn_of_fallback(loss: Loss, classes: int) -> None:
    """Warn where a loss cannot be climbed on a model with this many classes and another takes its place."""
    if loss.used(classes) != loss.kind:
        warnings.warn(
            f"loss {loss.kind!r} needs more classes than the {classes} of this model: "
            f"the {loss.used(classes)} is climbed in its place",
            stacklevel=2,
        )
