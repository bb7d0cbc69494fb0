"""Jacobian regularisation against universal perturbations (Co, Martinez Rego, Lupu, ICANN 2021, arXiv 2104.10459)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.jacobian_norm import JacobianNorm, JacobianSettings
from gambeson.defenses.objective import Defense, Objective, Scene, SharedForward
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Clean, Term


@register("jacobian", source="Co et al. 2021; Hoffman et al. 2019", cost="1 / 2")
class Jacobian(JacobianSettings, Defense):
    """Minimise E[CE(f(x), y)] + strength * E[||df/dx||_F^2] / 2 (Hoffman, Roberts, Yaida 2019, arXiv 1908.02729).

    The defaults are the public code's estimator, one random projection an image. The paper's strength, data sets and
    schedule are not known to us.

    Cheap forms with the same expectation take one forward-mode product on a part of every second or fourth batch::

        Jacobian(estimator="input", share=1 / 8, every=2)
        Jacobian(estimator="input", share=1 / 4, every=4)
    """

    strength: Annotated[Number, Field(ge=0)] = 0.01
    """Weight of the norm, in the space that ``space`` names; 0 is standard training. Ours: in pixel space, where the
    public code's 0.01 of normalised space would be 0.01 times the square of the pixels' standard deviation."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean term and the norm."""
        return {"clean": (1.0, Clean(label_smoothing=self.label_smoothing)), "jacobian": (self.strength, self._norm)}

    def open(self, scene: Scene) -> Objective:
        """Both terms with one forward for the two."""
        norm = self._norm.opened(tuple(scene.train.shape), scene.seed)
        return SharedForward(self.terms() | {"jacobian": (self.strength, norm)})

    @property
    def _norm(self) -> JacobianNorm:
        return JacobianNorm(**{name: getattr(self, name) for name in JacobianSettings.model_fields})
