"""Shared Adversarial Training (Mummadi, Brox, Metzen, ICCV 2019, arXiv 1812.03705)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from gambeson.attacks.universal.target import TAU, LabelSource
from gambeson.base import Number
from gambeson.defenses.objective import Adversarial, Clean, Defense, Term
from gambeson.defenses.registry import register
from gambeson.threat import Eps, Norm
from gambeson.victim import BatchNormMode, Precision


@register("shared-adversarial", source="Mummadi et al. 2019", cost="k + 2 / k + 2")
class SharedAdversarial(Defense):
    """Minimise sigma * E[max over xi of the mean CE of a heap of s images under one xi] + (1 - sigma) * E[CE].

    The inner attack takes 4 steps of eps / 2 on the cross-entropy truncated at -log 0.2 (both from the paper). The
    random start and evaluation statistics while crafting are ours: the paper leaves them open. Of label maps a heap
    consists of whole images, with s of 1 to 8 (ours), and the truncation acts per pixel, before any mean.
    """

    eps: Eps
    """Radius in pixel units; the paper goes from 2/255 to 26/255 on CIFAR-10."""
    norm: Norm = "inf"
    sharedness: Annotated[int, Field(ge=1)] = 64
    """Images s that share one perturbation: 1, 8 and 64 in the paper; s = 1 is adversarial training."""
    sigma: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Weight of the adversarial risk: 0.3 to 0.9 in the paper; 0 is standard training."""
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
    truncate: Number | None = -math.log(0.2)
    """Cap kappa of the untargeted inner cross-entropy, per image or pixel; None: no cap."""
    target: LabelSource | None = None
    """Inner attack towards the prediction on the first image of another heap, or towards its label or label map (ours,
    after Metzen et al. 2017); None: away from the truth."""
    tau: Annotated[Number, Field(gt=0, le=1)] | None = TAU
    """Targeted inner attack: images or pixels whose target is likelier than this have no gradient."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes, in both outer losses; the paper's amount is not known."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The heap risk and the clean risk."""
        clean = Clean(label_smoothing=self.label_smoothing)
        return {"adversarial": (self.sigma, self._heaps), "clean": (1 - self.sigma, clean)}

    @property
    def _heaps(self) -> Adversarial:
        return Adversarial(
            eps=self.eps,
            norm=self.norm,
            sharedness=self.sharedness,
            steps=self.steps,
            rel_step_size=self.rel_step_size,
            precision=self.craft_precision,
            attack_bn=self.attack_bn,
            truncate=self.truncate,
            target=self.target,
            tau=self.tau,
            label_smoothing=self.label_smoothing,
        )

    def check(self, batch_size: int) -> None:
        """Raise if the batch cannot be split into heaps.

        Raises:
            UserError: the sharedness does not divide it, or leaves one heap without another as its target.
        """
        if self.sigma:
            self._heaps.check(batch_size)
