"""The options of transfer attacks: DI, TI and SI, and gradients averaged over noise, VR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from gambeson.base import Config, Number
from gambeson.threat import Ball, norm_of_ones


class Diversity(Config):
    """Diverse inputs, DI (Xie et al. 2019, section 3.2): with some probability, an image is resized and padded.

    Images have independent draws. The image is placed on a canvas ``canvas`` times as large, at a random position and
    at a size between its own and the canvas's. The paper's sizes for 299 pixels are [299, 330) on 330.
    """

    probability: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Probability of the transform; the paper's 0.5."""
    canvas: Annotated[Number, Field(gt=1)] = 1.125
    """Side of the canvas over the side of the image: 36 of 32 pixels (ours); 330 / 299 = 1.104 in the paper."""
    fill: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Value of the padding: 0.5 is the paper's, whose zero is the grey of its range [-1, 1]; many ports to the range
    [0, 1] pad with black."""
    interpolation: Literal["bilinear", "nearest"] = "bilinear"
    """Interpolation of the resizing; ``nearest`` is that of the paper's code, ``bilinear`` has smoother gradients
    (ours)."""
    resize_back: bool = True
    """Resize the canvas to the image's size, so that models with a fixed input size can be attacked (ours). The paper
    uses the canvas itself, which an unchanged image then fills, because a batch has one size."""

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw the transform of each image: (N, 4) numbers in [0, 1)."""
        return torch.rand(len(images), 4, generator=generator, device=generator.device)

    def view(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return the transformed images, differentiable: two small matrix products per image.

        Args:
            images: (N, C, H, W).
            drawn: the rows of :meth:`draw` for these images.
        """
        if self.probability == 0:
            return images
        changed = drawn[:, 3] < self.probability
        size = drawn[:, 0].where(changed, torch.ones_like(drawn[:, 0]))
        rows = self._matrix(images.shape[2], size, drawn[:, 1]).to(images.dtype)
        columns = self._matrix(images.shape[3], size, drawn[:, 2]).to(images.dtype)
        moved = torch.einsum("nih,nchw,njw->ncij", rows, images, columns)
        covered = rows.sum(2).unsqueeze(2) * columns.sum(2).unsqueeze(1)
        moved = moved + self.fill * (1 - covered).unsqueeze(1)
        return torch.where(changed.view(-1, 1, 1, 1), moved, images) if self.resize_back else moved

    def _matrix(self, side: int, size: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Return (N, out, side): the weights of the image's lines in each line of the result."""
        canvas = max(side + 1, round(self.canvas * side))
        resized = side + (size * (canvas - side)).floor()
        offset = (place * (canvas - resized + 1)).floor()
        line = torch.arange(canvas, device=size.device) - offset.unsqueeze(1)  # of the resized image
        inside = (line >= 0) & (line < resized.unsqueeze(1))
        step = side / resized.unsqueeze(1)
        source = torch.arange(side, device=size.device)
        if self.interpolation == "nearest":
            weights = (line * step).floor().unsqueeze(2) == source
        else:
            centre = ((line + 0.5) * step - 0.5).clamp(0, side - 1)
            weights = (1 - (centre.unsqueeze(2) - source).abs()).clamp(min=0)
        matrix = weights * inside.unsqueeze(2).float()
        if not self.resize_back:
            return matrix
        centre = ((torch.arange(side, device=size.device) + 0.5) * canvas / side - 0.5).clamp(0, canvas - 1)
        back = (1 - (centre.unsqueeze(1) - torch.arange(canvas, device=size.device)).abs()).clamp(min=0)
        return back @ matrix


class Smoothing(Config):
    """Translation invariance, TI (Dong et al. 2019, section 3.3): the gradient is smoothed by a Gaussian.

    To first order this is the mean gradient over shifted copies of the image.
    """

    size: Annotated[int, Field(ge=1)] = 5
    """Side of the kernel in pixels, odd; 1 smooths nothing. The paper's 15 is for 299 pixels."""
    sigma: Annotated[Number, Field(gt=0)] = 1.0
    """Standard deviation in pixels (ours, for 32-pixel images). The paper's code lets the kernel span three standard
    deviations to each side: sigma = (size - 1) / 6, that is 2.33 for 15, but 0.33 for 3, which smooths nothing."""

    @field_validator("size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("the kernel needs a middle; choose an odd size")
        return size

    def kernel(self) -> torch.Tensor:
        """Return the kernel, (size, size), of sum 1."""
        steps = torch.arange(self.size) - self.size // 2
        line = torch.exp(-(steps / self.sigma).square() / 2)
        return torch.outer(line, line) / line.sum().square()

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (N, C, H, W) convolved with the kernel, each channel alone, zero outside."""
        if self.size == 1:
            return gradient
        channels = gradient.shape[1]
        kernel = self.kernel().to(gradient).expand(channels, 1, -1, -1)
        return F.conv2d(gradient, kernel, padding=self.size // 2, groups=channels)


class Scales(Config):
    """Scale invariance, SI (Lin et al. 2020, section 3.3): the mean gradient over copies scaled by 1, 1/2, 1/4, ...

    Cost: one forward and one backward per copy.
    """

    copies: Annotated[int, Field(ge=1)] = 5
    """Number of copies, including the image itself; the paper's 5."""
    toward: Literal["black", "grey"] = "black"
    """Limit of the scaling: ``black`` scales pixels in [0, 1], as in the paper's formula; ``grey`` scales pixels in
    [-1, 1], as in the paper's code. The two are different attacks."""

    def views(self) -> list[Callable[[torch.Tensor], torch.Tensor] | None]:
        """Return the transform of each copy; None for the image itself."""
        rest = 0.5 if self.toward == "grey" else 0.0
        shrunk = [self._shrink(0.5**power, rest) for power in range(1, self.copies)]
        return [None, *shrunk]

    @staticmethod
    def _shrink(scale: float, rest: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: rest + (images - rest) * scale


class Noise(Config):
    """Variance-reduced gradients, VR (Wu et al. 2018, arXiv 1802.09707): the mean over copies with Gaussian noise.

    A function that waves or climbs within the length of a step sends its gradient where a step does not go; the mean
    over copies is the gradient of the function smoothed by that noise, also of one that has no randomness. Copies are
    not clipped to [0, 1]: clipping would remove the gradient of values beyond it. Cost: one forward and one backward
    per copy.
    """

    copies: Annotated[int, Field(ge=1)] = 20
    """Number of copies, each with its own noise (ours)."""
    size: Annotated[Number, Field(gt=0)] = 1.0
    """Standard deviation of the noise as a share of eps; in the norms 2 and 1 about its length (ours)."""

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """Draw the noise of each copy, of standard deviation 1 and the images' shape."""
        return [
            torch.randn(images.shape, generator=generator, device=generator.device).to(images)
            for _ in range(self.copies)
        ]

    def deviation(self, ball: Ball, shape: Sequence[int]) -> float:
        """Return the standard deviation in pixel units, for images (C, H, W)."""
        return self.size * ball.eps / norm_of_ones(ball.norm, shape)
