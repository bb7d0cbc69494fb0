"""Gradient alignment loss (Kariyappa and Qureshi 2019, arXiv 1901.09981)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.diversity import coherence, cosines, loss_gradients
from gambeson.defenses.objective import Objective, Scene
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Batch
from gambeson.defenses.together import Together
from gambeson.models import PixelModel


@register("gal", source="Kariyappa and Qureshi 2019", cost="M members")
class GAL(Together):
    """Minimise mean_m CE_m + strength * E[log sum_{i<j} exp(cos(g_i, g_j))], g_m = grad_x CE_m.

    One forward serves the losses and the gradients; a public port takes two. The paper's nets use leaky ReLU.
    """

    strength: Annotated[Number, Field(ge=0)] = 0.5
    """Weight of the coherence; 0.5 in the paper."""

    def open(self, scene: Scene) -> Objective:
        """Open the objective."""
        return self._open(scene, self._compare, mean=True, slopes=bool(self.strength))

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        if not self.strength:
            return {}
        gradients = loss_gradients(logits, batch.labels, batch.images, batch.ignore_index)
        return {"coherence": (self.strength, coherence(cosines(gradients)))}
