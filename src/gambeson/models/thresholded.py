"""A control for defences on MNIST: an undefended network behind a threshold on the pixels."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.base import UserError


class Thresholded(nn.Module):
    """A model of thresholded pixels: f(1[x > 0.5]).

    On MNIST, whose pixels are almost black or white, this makes a standard network about as robust in the norm inf as
    adversarial training does (Tramer et al. 2018, appendix B), since no perturbation below 0.5 flips a black or white
    pixel. Compare the gain of a defence on MNIST with it.

    A step function has no gradient. With ``straight_through`` (the default is ours) the backward pass treats it as the
    identity, so that gradient attacks work; without it the gradient is masked, which an audit reports.

    Args:
        model: from pixels (N, C, H, W) to logits; shared and not modified.
        threshold: in pixel units, between 0 and 1.
        straight_through: pass gradients through the step.

    Raises:
        UserError: a threshold outside (0, 1).
    """

    def __init__(self, model: nn.Module, threshold: float = 0.5, *, straight_through: bool = True) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise UserError(f"threshold = {threshold:g}: expected a pixel value between 0 and 1, such as 0.5")
        self.model, self.threshold, self.straight_through = model, threshold, straight_through

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the thresholded images (N, C, H, W)."""
        step = (images > self.threshold).to(images.dtype)
        return self.model(step + (images - images.detach()) if self.straight_through else step)

    def extra_repr(self) -> str:
        """Return the settings, as torch prints them."""
        return f"threshold={self.threshold:g}, straight_through={self.straight_through}"
