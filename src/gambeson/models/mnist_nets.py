"""The four MNIST networks A to D of Ensemble Adversarial Training (arXiv 1705.07204, section 3)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from gambeson.models.registry import register

SMALLEST = {"a": 9, "b": 27, "c": 5, "d": 1}


class MnistNet(nn.Sequential):
    """A plain chain of layers from normalised images (N, C, H, W) of one size to logits (N, classes)."""

    fixed_size = True

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))


@register("mnist-a", smallest=SMALLEST["a"])
def net_a(in_channels: int, classes: int, image_size: tuple[int, int]) -> MnistNet:
    """Network A: conv64 5x5, conv64 5x5, dropout 0.25, fc128, dropout 0.5, fc; unpadded, ReLU throughout."""
    height, width = (side - 8 for side in image_size)
    return MnistNet(
        conv1=nn.Conv2d(in_channels, 64, 5),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(64, 64, 5),
        relu2=nn.ReLU(),
        drop1=nn.Dropout(0.25),
        flat=nn.Flatten(),
        fc1=nn.Linear(64 * height * width, 128),
        relu3=nn.ReLU(),
        drop2=nn.Dropout(0.5),
        fc2=nn.Linear(128, classes),
    )


@register("mnist-b", smallest=SMALLEST["b"])
def net_b(in_channels: int, classes: int, image_size: tuple[int, int]) -> MnistNet:
    """Network B: dropout 0.2 on the input, conv64 8x8 /2, conv128 6x6 /2, conv128 5x5, dropout 0.5, fc.

    The first convolution pads as TensorFlow's "same" does: an odd pixel goes right and below.
    """
    height, width = ((-(-side // 2) - 6) // 2 + 1 - 4 for side in image_size)
    top, bottom = _same_padding(image_size[0], kernel=8, stride=2)
    left, right = _same_padding(image_size[1], kernel=8, stride=2)
    return MnistNet(
        drop1=nn.Dropout(0.2),
        pad=nn.ZeroPad2d((left, right, top, bottom)),
        conv1=nn.Conv2d(in_channels, 64, 8, stride=2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(64, 128, 6, stride=2),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(128, 128, 5),
        relu3=nn.ReLU(),
        drop2=nn.Dropout(0.5),
        flat=nn.Flatten(),
        fc1=nn.Linear(128 * height * width, classes),
    )


@register("mnist-c", smallest=SMALLEST["c"])
def net_c(in_channels: int, classes: int, image_size: tuple[int, int]) -> MnistNet:
    """Network C: conv128 3x3, conv64 3x3, dropout 0.25, fc128, dropout 0.5, fc; unpadded, ReLU throughout."""
    height, width = (side - 4 for side in image_size)
    return MnistNet(
        conv1=nn.Conv2d(in_channels, 128, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(128, 64, 3),
        relu2=nn.ReLU(),
        drop1=nn.Dropout(0.25),
        flat=nn.Flatten(),
        fc1=nn.Linear(64 * height * width, 128),
        relu3=nn.ReLU(),
        drop2=nn.Dropout(0.5),
        fc2=nn.Linear(128, classes),
    )


@register("mnist-d", smallest=SMALLEST["d"])
def net_d(in_channels: int, classes: int, image_size: tuple[int, int]) -> MnistNet:
    """Network D: four times fc300 with ReLU and dropout 0.5, then fc; no convolution."""
    layers: dict[str, nn.Module] = {"flat": nn.Flatten()}
    features = in_channels * image_size[0] * image_size[1]
    for index in range(1, 5):
        layers |= {
            f"fc{index}": nn.Linear(features, 300),
            f"relu{index}": nn.ReLU(),
            f"drop{index}": nn.Dropout(0.5),
        }
        features = 300
    return MnistNet(**layers, fc5=nn.Linear(features, classes))


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
    return total // 2, total - total // 2
