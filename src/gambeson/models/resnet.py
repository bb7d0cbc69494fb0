"""Residual networks for small images: the CIFAR ResNets and ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.models.registry import register

Shortcut = Literal["pad", "project"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (or divides it by the stride, rounded up) and has no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016, section 4.2: strided, new channels full of zeros, no parameters.

    (N, C, H, W) becomes (N, out_channels, ceil(H / stride), ceil(W / stride)); the zeros come last.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the subsampled and widened features."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation, added to a shortcut (He et al. 2016, figure 2).

    Every ReLU is a separate module, so that hooks can be placed before or after it; ``relu2`` receives the sum.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return self.relu2(residual + self.shortcut(x))


class ResNet(nn.Module):
    """A post-activation residual network for small images: 3x3 stem, basic blocks, pixel mean, linear.

    The first stage keeps the size, each later one halves it (rounded up).

    Args:
        in_channels: channels of an image.
        classes: number of logits.
        widths: channels of each stage; the stem has those of the first.
        blocks: basic blocks in each stage.
        shortcut: ``"pad"`` (option A, no parameters) or ``"project"`` (option B, 1x1 convolution with batch
            normalisation) where the shape changes.
    """

    def __init__(
        self, in_channels: int, classes: int, widths: tuple[int, ...], blocks: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU()
        stages: list[nn.Module] = []
        before = widths[0]
        for index, width in enumerate(widths):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(BasicBlock(before, width, stride, shortcut))
                before = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)
        he_initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes) of normalised images (N, C, H, W)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.stages(x)
        return self.fc(self.pool(x).flatten(1))


def he_initialise(network: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out), as He et al. 2015 do for ReLU; leave the rest."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def scaled(widths: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Multiply channel counts by a width factor, rounded, with at least one channel each."""
    return tuple(max(1, round(width * factor)) for width in widths)


SMALLEST_IMAGENET_STYLE = 8  # below it a stage would halve a single pixel


@register("resnet18", smallest=SMALLEST_IMAGENET_STYLE, scalable=True)
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
