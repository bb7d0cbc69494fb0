"""A control for defences on MNIST: no defence at all, behind a threshold on the pixels."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.base import UserError


class Thresholded(nn.Module):
    """A model that sees only whether each pixel is above a threshold: f(1[x > 0.5]).

    On MNIST, whose pixels are almost black or white, this makes a network that was trained as usual about as robust
    in the norm inf as adversarial training does (Tramer et al. 2018, appendix B), since no perturbation below 0.5 moves
    a black or a white pixel across. What a defence gains on MNIST has to be read beside it.

    A step has no gradient. With ``straight_through`` (the default is ours) the backward pass takes the step for the
    identity, so that attacks have something to climb; without it the model hides its gradient, and an audit says so.

    Args:
        model: from pixels (N, C, H, W) to logits; left as it is, and shared.
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
