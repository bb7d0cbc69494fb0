"""Who shares a perturbation: its leading shape says it, and broadcasting does the rest."""

from __future__ import annotations

from typing import Literal

import torch

from gambeson.base import UserError

BoxGradient = Literal["exact", "straight-through"]
"""How the clip to [0, 1] is differentiated: ``exact`` gives a pixel beyond the ends no gradient;
``straight-through`` passes the gradient on, so that a shared perturbation can leave a pixel where most
images are black or white and its own value points outside the range (our choice, for universal attacks)."""


def perturb(images: torch.Tensor, delta: torch.Tensor, box_gradient: BoxGradient = "exact") -> torch.Tensor:
    """Add R perturbations to N images, each to N / R consecutive ones, and clip to [0, 1].

    Args:
        images: (N, C, H, W) in [0, 1].
        delta: (R, C, H, W); R = N is one perturbation an image, R = N / s one a heap of s (Mummadi et al. 2019,
            section 4), R = 1 a universal one. The gradient of a heap is summed by the broadcast, at no cost.
        box_gradient: how the clip is differentiated.

    Returns:
        (N, C, H, W) in [0, 1]; exactly ``images`` where delta is zero.

    Raises:
        UserError: R does not divide N.
    """
    heaps = len(delta)
    if heaps == 0 or len(images) % heaps:
        raise UserError(
            f"{heaps} perturbations cannot be shared evenly by {len(images)} images: "
            "choose a sharedness that divides the batch"
        )
    if heaps in (1, len(images)):
        moved = images + delta
    else:
        moved = (images.unflatten(0, (heaps, -1)) + delta.unsqueeze(1)).flatten(0, 1)
    clipped = moved.clamp(0, 1)
    if box_gradient == "exact":
        # Not the gradient of clamp: at the ends themselves it is 0 or 1 depending on torch's version.
        return torch.where((moved >= 0) & (moved <= 1), moved, clipped.detach())
    return clipped.detach() + (moved - moved.detach())
