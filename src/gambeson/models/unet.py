"""The U-Net for segmentation of small images."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.models.registry import register
from gambeson.models.resnet import conv3x3, he_initialise, scaled

SMALLEST = 16  # below it the fourth pooling would halve a single pixel


def conv_block(*widths: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [conv3x3(before, after), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


@register("unet-small", smallest=SMALLEST, scalable=True)
class UNet(nn.Module):
    """The U-Net of Ronneberger et al. 2015 (arXiv 1505.04597) with an eighth of its channels: 0.5 million weights.

    As there: five resolutions, each of two 3x3 convolutions, the channels doubled at every max-pooling (here from 8 to
    128), and skips. As is usual today, convolutions are padded, so that the logits have the size of the image, and
    followed by batch normalisation. Going up, a 1x1 convolution halves the channels and nearest-neighbour upsampling
    brings them to the size of the skip, which may be odd: unlike the paper's transposed convolution this leaves no
    chessboard pattern, and unlike bilinear upsampling its gradient is deterministic on GPUs.

    Args:
        in_channels: channels of an image.
        classes: number of logits per pixel.
        image_size: (H, W), at least 16x16; the network itself takes any size.
        width: factor on the channels; 8 has those of the paper.
    """

    def __init__(self, in_channels: int, classes: int, image_size: tuple[int, int], *, width: float = 1.0) -> None:
        super().__init__()
        widths = scaled((8, 16, 32, 64, 128), width)
        self.down = nn.ModuleList(
            conv_block(before, after, after) for before, after in pairwise((in_channels, *widths))
        )
        self.pool = nn.MaxPool2d(2)
        steps = list(pairwise(reversed(widths)))
        self.halve = nn.ModuleList(nn.Conv2d(below, width, 1) for below, width in steps)
        self.up = nn.ModuleList(conv_block(2 * width, width, width) for _, width in steps)
        he_initialise(self)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes, H, W) of normalised images (N, C, H, W)."""
        skips: list[torch.Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        for halve, block, skip in zip(self.halve, self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(halve(x), skip.shape[-2:], mode="nearest")
            x = block(torch.cat([skip, x], 1))
        return self.head(x)
