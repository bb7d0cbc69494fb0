"""LeNet in two sizes: 20-50-500 of the Jacobian-regularisation papers, and the first one, LeNet-5."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.models.registry import register

SMALLEST = 4
UNPADDED = 16  # the smallest side that two unpadded 5x5 convolutions and two poolings leave a pixel of


@register("lenet", smallest=SMALLEST)
class LeNet(nn.Module):
    """LeNet 20-50-500: conv20-5, pool, conv50-5, pool, fc500, fc10 (after LeCun et al. 1998).

    The network of the Jacobian papers. ReLU follows each pooling and the first linear layer. The convolutions
    are unpadded; where a side is under 16 pixels, which they would use up, they are padded by 2 and keep the
    size (8x8 digits then leave 2x2 features).

    Args:
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W), at least 4x4; the network takes this size only.
    """

    fixed_size = True

    def __init__(self, in_channels: int, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        padding = 2 if min(image_size) < UNPADDED else 0
        height, width = (_after_pooling(_after_pooling(side, padding), padding) for side in image_size)
        self.conv1 = nn.Conv2d(in_channels, 20, 5, padding=padding)
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU()
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes) of normalised images (N, C, H, W)."""
        x = self.relu1(self.pool1(self.conv1(x)))
        x = self.relu2(self.pool2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        return self.fc2(x)


@register("lenet5", smallest=SMALLEST)
class LeNet5(nn.Module):
    """LeNet-5: conv6-5, pool, conv16-5, pool, fc120, fc84, fc10 (LeCun et al. 1998, section II.B).

    As it is built today: ReLU, max-pooling, every map of the second convolution connected to every map of the
    first. The first convolution is padded by 2, which turns 28 pixels into the paper's 32; the second is padded
    where a side is under 16 pixels. 61,706 parameters at 1x28x28: a fifth of LeNet 20-50-500's work.

    Args:
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W), at least 4x4; the network takes this size only.
    """

    fixed_size = True

    def __init__(self, in_channels: int, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        padding = 2 if min(image_size) < UNPADDED else 0
        height, width = (_after_pooling(_after_pooling(side, 2), padding) for side in image_size)
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 16, 5, padding=padding)
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU()
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes) of normalised images (N, C, H, W)."""
        x = self.relu1(self.pool1(self.conv1(x)))
        x = self.relu2(self.pool2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        return self.fc3(self.relu4(self.fc2(x)))


def _after_pooling(side: int, padding: int) -> int:
    return (side + 2 * padding - 4) // 2
