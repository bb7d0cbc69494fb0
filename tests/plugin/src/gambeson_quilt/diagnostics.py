"""A diagnostic."""

import torch

from gambeson.auditing import Finding, register


@register(
    "finite logits",
    condition="a logit of a clean image is NaN or infinite",
    explanation="Such an image is right or wrong by accident.",
    remedy="Find the operation that overflows.",
    gradients=False,
)
def finite_logits(evidence):
    """Look at the logits of the sample's first images."""
    images, _ = evidence.sample.take(slice(0, 16), evidence.victim.device)
    with torch.no_grad():
        bad = int((~evidence.victim.forward_original(images).isfinite()).any(1).sum())
    return Finding(bad == 0, f"{bad} of {len(images)} images have a logit that is not finite", {"bad": bad})
