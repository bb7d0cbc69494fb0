"""Validation of images and labels, in one place; every error says what was given and what to do."""

from __future__ import annotations

import torch

from gambeson.base.errors import UserError

TOLERANCE = 1e-6
"""Pixels this far outside [0, 1] are rounding errors and are clipped; anything further is an error."""


def check_images(images: torch.Tensor) -> torch.Tensor:
    """Return ``images`` (N, C, H, W) as floats in [0, 1], clipped where rounding left them outside.

    Raises:
        UserError: not a float batch of four dimensions, not finite, or outside [0, 1].
    """
    if images.ndim != 4:
        raise UserError(f"images have shape {tuple(images.shape)}: expected a batch (N, C, H, W)")
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}: expected floats in [0, 1]; pass images.float() / 255")
    if images.numel() == 0:
        return images
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low > -float("inf") and high < float("inf")):
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise UserError(f"{len(bad)} images hold NaN or infinite pixels, the first at index {int(bad[0])}: remove them")
    if low >= 0 and high <= 1:
        return images
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return images.clamp(0, 1)
    if low < 0:
        cause = "they look normalised: pass pixels, and put the normalisation inside the model"
    else:
        cause = "they look like 0..255: divide by 255"
    raise UserError(f"images must lie in [0, 1], but reach from {low:.4g} to {high:.4g}; {cause}")


def check_batch(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Check a batch and its labels together; return the images as :func:`check_images` does."""
    if len(images) != len(labels):
        raise UserError(
            f"{len(images)} images came with {len(labels)} labels: expected one label map or label per image"
        )
    if images.device != labels.device:
        raise UserError(f"images are on {images.device} and labels on {labels.device}: move them to one device")
    return check_images(images)
