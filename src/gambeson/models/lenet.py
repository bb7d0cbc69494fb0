"""LeNet 20-50-500 of the Jacobian papers, LeNet-5, and the MNIST networks A to D of Ensemble Adversarial Training."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.autograd import forward_ad

from gambeson.models.registry import register

SMALLEST = 4
UNPADDED = 16  # the smallest side of which two unpadded 5x5 convolutions and two poolings leave a pixel


class MaxPool(nn.MaxPool2d):
    """Max-pooling of 2x2 windows: the values of ``nn.MaxPool2d(2)``, on a CPU in a tenth of its time.

    PyTorch's kernel also finds where the maxima are, which is only needed for a derivative.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H // 2, W // 2) of (N, C, H, W)."""
        traced = type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch._C._is_tracing()
        if traced or x.requires_grad or x.device.type != "cpu" or _differentiates():
            return super().forward(x)
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _differentiates() -> bool:
    """Whether there may be derivatives in forward mode, or of ``torch.func``, which no flag of a tensor tells."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


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
        self.pool1 = MaxPool()
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.pool2 = MaxPool()
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

    In its modern form: ReLU, max-pooling, every map of the second convolution connected to every map of the
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
        self.pool1 = MaxPool()
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 16, 5, padding=padding)
        self.pool2 = MaxPool()
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


SMALLEST_MNIST = {"a": 9, "b": 27, "c": 5, "d": 1}


class MnistNet(nn.Sequential):
    """A plain chain of layers from normalised images (N, C, H, W) of one size to logits (N, classes)."""

    fixed_size = True

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))


@register("mnist-a", smallest=SMALLEST_MNIST["a"])
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


@register("mnist-b", smallest=SMALLEST_MNIST["b"])
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


@register("mnist-c", smallest=SMALLEST_MNIST["c"])
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


@register("mnist-d", smallest=SMALLEST_MNIST["d"])
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
