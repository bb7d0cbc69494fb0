"""ResNet-18 for 32-pixel images."""

from __future__ import annotations

from gambeson.models.blocks import ResNet, scaled
from gambeson.models.registry import register

SMALLEST = 8  # below it a stage would halve a single pixel


@register("resnet18", smallest=SMALLEST, scalable=True)
def resnet18(in_channels: int, classes: int, image_size: tuple[int, int], *, width: float = 1.0) -> ResNet:
    """Build the ResNet-18 of He et al. 2016 (table 1) with a stem for small images: 3x3, no max-pooling.

    Shortcuts are option B (1x1 convolution with batch normalisation) where the shape changes. It is the
    network that Learn2Perturb (arXiv 2003.01090) calls "ResNet-V2 (18)": that, too, is post-activation.

    Args:
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W), at least 8x8; the network itself takes any size.
        width: factor on the channels 64-128-256-512.
    """
    return ResNet(in_channels, classes, scaled((64, 128, 256, 512), width), 2, "project")
