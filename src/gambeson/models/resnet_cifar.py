"""The CIFAR residual networks of depth 6n + 2: ResNet-20, 32, 44 and 56."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gambeson.models.blocks import ResNet, scaled
from gambeson.models.registry import register

SMALLEST = 4  # below it a stage would halve a single pixel


def resnet_v1(in_channels: int, classes: int, image_size: tuple[int, int], *, depth: int, width: float = 1.0) -> ResNet:
    """Build the CIFAR ResNet of He et al. 2016 (arXiv 1512.03385), section 4.2: three stages of n blocks.

    Shortcuts are option A (strided, zero-padded channels), as in that paper and in the public code of
    Learn2Perturb (arXiv 2003.01090), whose "ResNet-V1" this is. Width 4 (64-128-256) with depth 20 is the
    network of Shared Adversarial Training (arXiv 1812.03705), section 4.

    Args:
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W), at least 4x4; the network itself takes any size.
        depth: 6n + 2.
        width: factor on the channels 16-32-64.
    """
    return ResNet(in_channels, classes, scaled((16, 32, 64), width), (depth - 2) // 6, "pad")


def _named(depth: int) -> Callable[..., ResNet]:
    summary = f"ResNet-{depth} for small images (He et al. 2016, arXiv 1512.03385, section 4.2)."
    built = partial(resnet_v1, depth=depth)
    return register(f"resnet{depth}", smallest=SMALLEST, scalable=True, summary=summary)(built)


resnet20 = _named(20)
resnet32 = _named(32)
resnet44 = _named(44)
resnet56 = _named(56)
