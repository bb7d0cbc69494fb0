"""Jacobian regularisation against universal perturbations (Co, Martinez Rego, Lupu, ICANN 2021, arXiv 2104.10459)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.jacobian_norm import JacobianNorm, JacobianSettings
from gambeson.defenses.objective import Defense, Objective, Scene
from gambeson.defenses.shared_forward import SharedForward
from gambeson.defenses.terms import Clean, Term


class Jacobian(JacobianSettings, Defense):
    """Minimise E[CE(f(x), y)] + strength * E[||df/dx||_F^2] / 2 (Hoffman, Roberts, Yaida 2019, arXiv 1908.02729).

    The defaults are the public code's estimator, one random projection an image. The paper's strength, data sets and
    schedule are not known to us.

    A cheap form with the same expectation takes one finite difference on an eighth of each batch::

        Jacobian(estimator="input", share=1 / 8)
    """

    strength: Annotated[Number, Field(ge=0)] = 0.01
    """Weight of the norm, in the space that ``space`` names; 0 is standard training. Ours, in pixel space. The public
    code's examples take 0.01 to 0.1 in normalised space, which is 0.01 / std^2 to 0.1 / std^2 in pixels... """
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
