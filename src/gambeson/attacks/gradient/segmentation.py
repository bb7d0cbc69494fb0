"""SegPGD, CosPGD and SEA: gradient attacks made for label maps, as settings of PGD and Auto-PGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.attacks.gradient.auto_pgd import AutoPGD, State
from gambeson.attacks.gradient.base import BestSoFar
from gambeson.attacks.gradient.pgd import PGD
from gambeson.attacks.losses import Loss, LossName
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import Number

_STEPS = {"inf": 0.01 / (8 / 255), "2": 0.1 / (64 / 255)}
"""Step size as a share of eps (Agnihotri et al. 2024, sections 5 and B.5): 0.01 at 8/255; 0.1 at 64/255, 0.2 at
128/255."""


@register("cospgd", source="Agnihotri et al. 2024", cost="steps + 1 / steps, per restart")
class CosPGD(PGD):
    """CosPGD (Agnihotri et al. 2024, section 3): PGD on cross-entropy, weighted by the cosine of softmax and label.

    The weight of a pixel is held constant in the gradient, as in the authors' code; the paper writes it inside. Steps
    and start are theirs: 0.01 at eps 8/255 in the norm inf, scaled with eps (ours); in the norm 2, 0.1 at 64/255; from
    a uniform draw in the ball. The number of steps is ours; their tables start at 3. The result per image is the point
    with the most wrong pixels (ours; ``keep="last"`` is their code's). Costs ``steps`` + 1 forwards and ``steps``
    backwards per image and restart.

    Croce et al. 2024 (section B.1) tuned both attacks to steps of 0.003 at 4/255 and 0.005 at 8/255:
    ``rel_step_size=0.19`` and ``0.16``.
    """

    loss: LossName = "cospgd"
    keep: Literal["last", "best"] = "best"

    @property
    def _first(self) -> float:
        return super()._first if self.rel_step_size is not None else _STEPS.get(self.norm, super()._first)


@register("segpgd", source="Gu et al. 2022", cost="steps + 1 / steps, per restart")
class SegPGD(CosPGD):
    """SegPGD (Gu et al. 2022, section 4): PGD that turns from the pixels still right to all pixels, step by step.

    At step t of T the cross-entropy of pixels that are wrong has weight lambda = (t - 1) / 2T, that of the others
    1 - lambda. Otherwise as :class:`CosPGD`, whose authors ran both with the same steps.
    """

    loss: LossName = "segpgd"


@register("sea", source="Croce et al. 2024", cost="losses x (steps + 3) / losses x steps")
class SEA(AutoPGD):
    """Semantic ensemble attack (Croce et al. 2024, section 3.6): Auto-PGD on three losses, in three shrinking balls.

    A run per loss takes 300 steps in stages of 90, 90 and 120 at radii of 2, 1.5 and 1 eps; each stage starts at the
    projected result of the one before, the first at a random point of its ball. Gradients are those of the loss;
    steps are judged by the plain cross-entropy. The result per image is the point with the most wrong pixels, over
    all losses, which is the worst case for the pixel accuracy; for that of the mean IoU, a suite chooses among the
    runs of each loss (:meth:`each`, :func:`gambeson.evaluation.run_suite`). The norm is inf in the paper. Costs per
    image, loss and restart ``steps`` backwards and a forward more per stage: 303 and 300. Images without a right pixel
    cost nothing more.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    """Gradient steps per loss; the paper's 300."""
    losses: Annotated[tuple[LossName, ...], Field(min_length=1)] = ("mce", "mce-bal", "js")
    """The losses, a run each."""
    loss: LossName = "cross-entropy"
    """What steps are judged by."""
    class_pixels: tuple[Annotated[Number, Field(ge=0)], ...] | None = None
    """See :attr:`gambeson.attacks.Loss.class_pixels`."""
    radii: tuple[Annotated[Number, Field(ge=1)], ...] = (2.0, 1.5, 1.0)
    portions: tuple[Annotated[Number, Field(gt=0)], ...] = (0.3, 0.3, 0.4)
    start_size: Annotated[Number, Field(ge=0)] = 2.0
    targets: None = None
    """Not for this attack."""

    def each(self, class_pixels: Sequence[float] | None = None) -> dict[str, SEA]:
        """Return an attack per loss, by the name ``sea-LOSS``, among whose results a suite can choose.

        Args:
            class_pixels: of all of them, in place of those of this attack.
        """
        pixels = self.class_pixels if class_pixels is None else tuple(class_pixels)
        return {
            f"sea-{loss}": self.model_copy(update={"losses": (loss,), "class_pixels": pixels}) for loss in self.losses
        }

    def _search(
        self, solver: ProjectedGradient, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor
    ) -> None:
        record = BestSoFar.into(best)
        for restart in range(self.restarts):
            for kind in self.losses:
                loss = Loss(kind=kind, targeted=self.reaches, class_pixels=self.class_pixels)
                run = dataclasses.replace(solver, loss=loss)
                self._run(run, x, y, y, f"{restart}/{kind}", seed, record)

    def _judge(self, solver: ProjectedGradient) -> Loss:
        return Loss(kind=self.loss, targeted=self.reaches)

    def _handed_on(self, state: State, record: BestSoFar) -> torch.Tensor:
        return record.delta
