"""Jacobian Ensembles (Co, Martinez-Rego, Hau, Lupu, ICANN 2022, arXiv 2204.08726)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import Number
from gambeson.defenses.ensemble import IndependentEnsemble
from gambeson.defenses.jacobian import Jacobian, JacobianNorm, JacobianSettings
from gambeson.defenses.objective import Batch, Losses, Objective, Term, TrainContext
from gambeson.defenses.pgd_adversarial import Standard
from gambeson.defenses.registry import register
from gambeson.models import Members, PixelModel


@register("jacobian-ensemble", source="Co et al. 2022", cost="M times `jacobian`")
class JacobianEnsemble(JacobianSettings, IndependentEnsemble):
    """An ensemble whose members each minimise E[CE] + strength * E[||df/dx||_F^2] / 2.

    Only the abstract of the paper is known to us: number of members, vote, independence and strength are ours.
    """

    strength: Annotated[Number, Field(ge=0)] = 0.01
    """Weight of the norm, the same for every member; 0 is the plain ensemble."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""
    joint: bool = False
    """Penalise the Jacobian of the members' mean logits, with M times the strength, instead of each member's own: size
    and alignment at once (ours). Computed on as many images as one member has, evenly spaced over the batch."""
    shared_projection: bool = False
    """Use the same random directions for all members, to compare them with less variance (ours)."""

    @model_validator(mode="after")
    def _check_joint(self) -> JacobianEnsemble:
        if self.joint and (self.at_once != "loop" or self.shared_projection or self.power):
            raise ValueError("joint=True has one norm for all members: leave at_once, shared_projection and power")
        if self.shared_projection and self.at_once == "stacked":
            raise ValueError("stacked members draw for the joined batch: choose at_once='loop' for shared_projection")
        return self

    @property
    def single(self) -> Jacobian:
        """The defence of each member."""
        shared = {*JacobianSettings.model_fields, "strength", "label_smoothing"}
        return Jacobian(**{name: getattr(self, name) for name in shared})

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The terms of one member."""
        return self.single.terms()

    def build_objective(self, context: TrainContext) -> Objective:
        """Every member's objective, or the joint one; for a single member that of a single model."""
        if self.members == 1:
            return self.single.build_objective(context)
        if not (self.joint and self.strength):
            return self._open(context, self.single, shared_draws=self.shared_projection)
        norm = JacobianNorm(
            **{name: getattr(self, name) for name in JacobianSettings.model_fields if name != "share"},
            share=self.share / self.members,
        )
        plain = self._open(context, Standard(label_smoothing=self.label_smoothing))
        assert isinstance(context.model, PixelModel)
        return Joint(plain, MeanLogits(context.model), norm, self.strength * self.members)


class Joint(Objective):
    """The members' own losses and the norm of the Jacobian of their mean logits.

    Args:
        plain: the members' clean objective.
        view: the mean logits.
        norm: of its Jacobian, on a share of the joined batch.
        weight: of the norm.
    """

    def __init__(self, plain: Objective, view: MeanLogits, norm: JacobianNorm, weight: float) -> None:
        super().__init__({})
        self.plain = plain
        self._view = (view,)  # in a tuple: the model is no part of the objective's state
        self._norm, self._weight = norm, weight

    def optimizer_steps(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        """Yield both together."""
        for losses, moving in self.plain.optimizer_steps(model, batch):
            yield self._with_norm(losses, batch), moving

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate both."""
        return self._with_norm(self.plain.losses(model, batch), batch)

    def _with_norm(self, losses: Losses, batch: Batch) -> Losses:
        value = self._norm(self._view[0], batch)
        return losses | {"loss": losses["loss"] + self._weight * value, "jacobian": value.detach()}


class MeanLogits(nn.Module):
    """Pixels (N, C, H, W) to the mean of the members' logits (N, K), for any ``average`` of the model."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.normalize = model.normalize
        self.body = model.body

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean."""
        assert isinstance(self.body, Members)
        return self.body.each(self.normalize(pixels)).mean(0)
