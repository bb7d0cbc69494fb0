"""Adaptive diversity promoting (Pang, Xu, Du, Chen, Zhu, ICML 2019, arXiv 1901.08846)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.diversity import entropy, log_det
from gambeson.defenses.objective import Objective, Scene
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Batch
from gambeson.defenses.together import Together, check_classes
from gambeson.models import PixelModel
from gambeson.models.members import vote


@register("adp", source="Pang et al. 2019", cost="M members")
class ADP(Together):
    """Minimise sum_m CE_m - alpha * H(mean_m p_m) - beta * log det(V^T V + 1e-6 I).

    V has each member's prediction of the wrong classes as a column of length 1 (see
    :func:`gambeson.defenses.diversity.log_det`). The weights are the paper's, for M = 3; its optimiser (Adam, 1e-3)
    and length (200 epochs) are a matter of the recipe.
    """

    alpha: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of the entropy of the mean prediction."""
    beta: Annotated[Number, Field(ge=0)] = 0.5
    """Weight of the log-determinant."""

    def open(self, scene: Scene) -> Objective:
        """Open the objective.

        Raises:
            UserError: more members than wrong classes.
        """
        check_classes(self.members, len(scene.train.classes))
        return self._open(scene, self._compare)

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        values: dict[str, tuple[float, torch.Tensor]] = {}
        with torch.autocast(logits.device.type, enabled=False):
            exact = logits.float()
            if self.alpha:
                values["entropy"] = -self.alpha, entropy(vote(exact, "probabilities"))
            if self.beta:
                values["log_det"] = -self.beta, log_det(exact, batch.labels)
        return values
