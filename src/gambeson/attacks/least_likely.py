"""Attacks towards the least likely class: Step-LL, R+Step-LL and Iter-LL, as settings of PGD.

The class is the one of the smallest logit on the clean image (Kurakin et al. 2017; Tramèr et al. 2018, section 2.2),
whatever the labels say; finding it costs one forward an image.
"""

from __future__ import annotations

from gambeson.attacks.gradient import FGSM, IFGSM, RFGSM
from gambeson.attacks.per_image import LabelChoice
from gambeson.attacks.registry import register


@register("step-ll", source="Kurakin et al. 2017", cost="2 / 1")
class StepLL(FGSM):
    """Step-LL: one step of length eps down the cross-entropy of the least likely class."""

    label: LabelChoice = "least-likely"


@register("r-step-ll", source="Tramèr et al. 2018, section 3.4", cost="2 / 1")
class RStepLL(RFGSM):
    """R+Step-LL (Tramèr et al. 2018, section 3.4): a random-sign step of alpha, then Step-LL with eps - alpha.

    The class is that of the clean image, not of the random start, as in the paper's ImageNet code; the label
    smoothing and auxiliary head of that code are left out.
    """

    label: LabelChoice = "least-likely"


@register("iter-ll", source="Kurakin et al. 2017", cost="steps + 1 / steps")
class IterLL(IFGSM):
    """Iter-LL: steps of eps / steps down the cross-entropy of the least likely class."""

    label: LabelChoice = "least-likely"
