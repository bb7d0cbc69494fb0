"""FCN-8s on VGG-16, the fully convolutional network with skips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.models.registry import register
from gambeson.models.resnet import he_initialise, scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and 3x3 convolutions of each stage of VGG-16; a max-pooling ends each."""


class FCN8s(nn.Module):
    """FCN-8s of Long et al. 2015 (arXiv 1411.4038, section 4.2): VGG-16, scored at strides 32, 16 and 8.

    As in the paper, the fully connected layers are convolutions (7x7 and 1x1, of 4096 channels, with dropout). Their
    scores and those of two poolings start at zero and are summed; the upsamplings between strides start as bilinear
    interpolation and are learnt, and the last, eightfold one stays bilinear. Unlike there, every convolution is padded
    by half its size, and poolings round up, instead of padding the image by 100 pixels; and weights start as He et al.
    2015 draw them, so that the network can be trained from scratch.

    Args:
        in_channels: channels of an image.
        classes: number of logits per pixel.
        image_size: (H, W); the network takes any size.
        width: factor on the channels 64 to 4096.
        batch_norm: normalise after each 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        image_size: tuple[int, int],
        *,
        width: float = 1.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        *widths, full = scaled((*(channels for channels, _ in STAGES), 4096), width)
        stages: list[nn.Module] = []
        before = in_channels
        for after, (_, convolutions) in zip(widths, STAGES, strict=True):
            layers: list[nn.Module] = []
            for _ in range(convolutions):
                norm = [nn.BatchNorm2d(after)] if batch_norm else []
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU()]
                before = after
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            *(nn.Conv2d(before, full, 7, padding=3), nn.ReLU(), nn.Dropout()),
            *(nn.Conv2d(full, full, 1), nn.ReLU(), nn.Dropout()),
        )
        he_initialise(self)
        scores = [nn.Conv2d(channels, classes, 1) for channels in (*widths[2:4], full)]
        ups = [nn.ConvTranspose2d(classes, classes, 4, 2, padding=1, bias=False) for _ in range(2)]
        self.scores, self.up = nn.ModuleList(scores), nn.ModuleList(ups)
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            for parameter in self.scores.parameters():
                parameter.zero_()
            for up in ups:
                up.weight.copy_(torch.eye(classes)[..., None, None] * torch.outer(ramp, ramp))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes, H, W) of normalised images (N, C, H, W)."""
        height, width = x.shape[2:]
        pools: list[torch.Tensor] = []
        for stage in self.stages:
            x = stage(x)
            pools.append(x)
        scored = self.scores[2](self.head(x))
        for up, score, pool in zip(self.up, (self.scores[1], self.scores[0]), (pools[3], pools[2]), strict=True):
            skip = score(pool)
            scored = up(scored)[..., : skip.shape[2], : skip.shape[3]] + skip
        full = F.interpolate(scored, scale_factor=8.0, mode="bilinear", align_corners=False)
        return full[..., :height, :width]


def _named(name: str, batch_norm: bool, what: str) -> Callable[..., FCN8s]:
    summary = f"FCN-8s on VGG-16{what} for segmentation (Long et al. 2015, arXiv 1411.4038)."
    return register(name, scalable=True, summary=summary)(partial(FCN8s, batch_norm=batch_norm))


fcn8s = _named("fcn8s", False, "")
fcn8s_bn = _named("fcn8s-bn", True, " with batch normalisation, which the paper's has not,")
