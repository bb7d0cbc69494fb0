"""Combinations of a risk, Jacobian regularisation and learnt noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gambeson.base import UserError
from gambeson.defenses.jacobian import Jacobian
from gambeson.defenses.learn2perturb import NOISE, Learn2Perturb, Learn2PerturbObjective
from gambeson.defenses.objective import Defense, Objective, SharedForward, Term, TrainContext, Weight
from gambeson.defenses.pgd_adversarial import Standard
from gambeson.defenses.registry import AnyDefense, register


@register("combination", cost="the sum of its parts")
class Combination(Defense):
    """The sum of a risk, a Jacobian penalty and the regulariser of learnt noise; each is optional.

    In YAML::

        defense:
          name: combination
          risk: {name: shared-adversarial, eps: 0.2, sharedness: 16}
          jacobian: {strength: 0.01}
          noise: {gamma: 1e-4, noise_from: 0}

    An ensemble whose members are trained this way is ``{name: ensemble, members: 5, inner: {name: combination, ...}}``.
    A part of weight zero changes nothing, bit for bit.
    """

    risk: AnyDefense = Standard()
    """Any defence of a single model without noise."""
    jacobian: Jacobian | None = None
    """The Jacobian penalty, without its clean risk."""
    noise: Learn2Perturb | None = None
    """The learnt noise and its schedule, without its risk; ``eps`` is optional."""

    def __init__(self, **fields: Any) -> None:
        noise = fields.get("noise")
        if isinstance(noise, dict):
            fields["noise"] = {"eps": 0.0, **noise}
        super().__init__(**fields)
        if self.risk.num_members != 1 or isinstance(self.risk, Combination | Learn2Perturb):
            raise UserError(
                f"risk is {type(self.risk).__name__}: expected a defence of one model without noise; put members "
                "around the combination (name: ensemble, inner: ...) and noise into its own field"
            )

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The terms of the risk and the added ones."""
        found: dict[str, tuple[Weight, Term]] = dict(self.risk.terms())
        if self.jacobian is not None:
            found["jacobian"] = self.jacobian.terms()["jacobian"]
        if self.noise is not None:
            found[NOISE] = self.noise.terms()[NOISE]
        return found

    def build_objective(self, context: TrainContext) -> Objective:
        """Build every part for one model."""
        if self.noise is not None:
            self.noise.build_objective(context)  # adds the noise to a model without a card
        risk = self.risk.build_objective(context)
        if self.jacobian is None and self.noise is None:
            return risk
        if not risk.terms:
            raise UserError(f"{type(self.risk).__name__} has no terms to add to: choose another risk")
        found = dict(risk.terms)
        if self.jacobian is not None and self.jacobian.strength:
            found["jacobian"] = self.jacobian.build_objective(context).terms["jacobian"]
        if self.noise is None:
            return SharedForward(found)
        found[NOISE] = self.noise.terms()[NOISE]
        return Learn2PerturbObjective(found, context.model, self.noise.noise_start, self.noise.update)

    def configure_model(self, model: nn.Module) -> None:
        """Add the noise, if any, to the model."""
        self.risk.configure_model(model)
        if self.noise is not None:
            self.noise.configure_model(model)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Those of the risk and of the noise."""
        return [*self.risk.groups(model), *([] if self.noise is None else self.noise.groups(model))]

    def check(self, batch_size: int) -> None:
        """Check the batch of the risk."""
        self.risk.check(batch_size)

    def with_source_models(self, load: Callable[[str], nn.Module]) -> Combination:
        """Load the source models of the risk."""
        return self.model_copy(update={"risk": self.risk.with_source_models(load)})

    def fully_active_epoch(self, epochs: int) -> int:
        """The epoch in which the last part starts."""
        return max(part.fully_active_epoch(epochs) for part in (self.risk, self.noise) if part is not None)

    @property
    def eps(self) -> float | None:
        """The risk's radius, used to compare epochs."""
        return getattr(self.risk, "eps", None)

    @property
    def norm(self) -> Any:
        """The risk's norm."""
        return getattr(self.risk, "norm", "inf")
