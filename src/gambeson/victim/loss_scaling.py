"""Gradients through a model in half precision that do not underflow: a scale for each image, on its way in and out."""

from __future__ import annotations

import torch

_TINY = torch.finfo(torch.float32).tiny


class LossScaling:
    """Scale the gradient of each image's logits to a largest entry of about 1, and that of the image back.

    The loss of an image that a model is sure about has a gradient below 6e-8, the smallest number of float16: an attack
    would see none. Loss scaling is that of training in half precision (Micikevicius et al. 2018, section 3.2), with a
    scale for each image in place of one for all, so that it suits what images share as well. Scales are powers of two:
    nothing is rounded. One object is for one forward, through weights in half precision or an autocast.
    """

    def __init__(self) -> None:
        self.scales: torch.Tensor | None = None

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images (N, C, H, W) for the model; their gradient is scaled back."""
        images = images.view_as(images)  # a leaf's hook would see the gradients of other forwards too
        images.register_hook(lambda gradient: gradient if self.scales is None else gradient / self._like(gradient))
        return images

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the model's logits (N, K) or (N, K, H, W) in float32 or better; their gradient is scaled."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.requires_grad:
            logits = logits.view_as(logits)
            logits.register_hook(self._scaled)
        return logits

    def _scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.abs().amax(tuple(range(1, gradient.ndim))).clamp(min=_TINY)
        self.scales = torch.exp2(-largest.log2().ceil()).nan_to_num(1.0, 1.0)
        return gradient * self._like(gradient)

    def _like(self, gradient: torch.Tensor) -> torch.Tensor:
        assert self.scales is not None
        return self.scales.view(-1, *[1] * (gradient.ndim - 1))
