"""Standard training, the baseline of every table, and PGD adversarial training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.objective import Adversarial, Clean, Defense, Term
from gambeson.defenses.registry import register
from gambeson.threat import Eps, Norm
from gambeson.victim import BatchNormMode, Precision


@register("standard", cost="1 / 1")
class Standard(Defense):
    """Minimise E[CE(f(x), y)]."""

    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean term."""
        return {"clean": (1.0, Clean(label_smoothing=self.label_smoothing))}


@register("pgd-adversarial", source="Madry et al. 2018", cost="k + 1 / k + 1")
class PGDAdversarial(Defense):
    """Minimise E[max over the ball of CE(f(x + delta), y)], one delta per image (Madry et al. 2018, equation 2.1).

    The inner attack, 4 steps of eps / 2, is that of Mummadi et al. 2019 (ours), so that this equals Shared Adversarial
    Training with sharedness 1, sigma 1 and no truncation, bit for bit.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    steps: Annotated[int, Field(ge=1)] = 4
    """Gradient steps of the inner attack."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.5
    """Step size as a share of eps."""
    craft_precision: Precision = "float32"
    """Precision of the model while crafting, independent of the recipe's; bfloat16 is faster on hardware that supports
    it."""
    attack_bn: BatchNormMode = "eval"
    """BatchNorm statistics while crafting: the running ones (``eval``), those of the perturbed batch (``batch``), or
    those of the batch with the whole model in training mode, including dropout and updates of the running statistics
    (``train``). The paper leaves it open; the default is ours."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The adversarial term."""
        return {
            "adversarial": (
                1.0,
                Adversarial(
                    eps=self.eps,
                    norm=self.norm,
                    steps=self.steps,
                    rel_step_size=self.rel_step_size,
                    precision=self.craft_precision,
                    attack_bn=self.attack_bn,
                ),
            )
        }
