"""Arrays and images as tensors, in one place; every error says what was given and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gambeson.base.errors import UserError

TOLERANCE = 1e-6
"""Pixels this far outside [0, 1] are rounding errors and are clipped; anything further is an error."""


def as_tensor(values: Any, what: str) -> torch.Tensor:
    """Return a tensor, an array, a list or whatever numpy can read as one contiguous tensor of numbers, without graph.

    Args:
        values: the numbers; integers other than uint8 become int64, because torch lacks some of their types.
        what: their name, for errors.

    Raises:
        UserError: not numbers, or rows of different lengths.
    """
    try:
        if isinstance(values, list | tuple) and values and all(isinstance(one, torch.Tensor) for one in values):
            values = torch.stack(list(values))
        if not isinstance(values, torch.Tensor):
            array = np.asarray(values)
            if array.dtype.kind not in "biuf":
                raise UserError(f"{what} are a {type(values).__name__}: expected a torch tensor or an array of numbers")
            kind = array.dtype.newbyteorder("=")
            array = array.astype(np.int64 if kind.kind in "iu" and kind != np.uint8 else kind, copy=False)
            # A tensor may not share memory that is read-only or strided backwards.
            values = torch.as_tensor(np.require(array, requirements=["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} cannot become one tensor ({error}): expected numbers of one shape") from None
    tiny = values.is_floating_point() and values.element_size() == 1  # torch computes nothing in these types
    if values.layout != torch.strided or values.is_quantized or values.is_nested or values.is_meta or tiny:
        raise UserError(
            f"{what} are a sparse, quantized, nested, float8 or meta tensor: expected a dense one of ordinary numbers"
        )
    values = values.detach().as_subclass(torch.Tensor).contiguous()  # sums would depend on the layout, by rounding
    if values.is_inference():  # autograd keeps none of these
        with torch.inference_mode(False):
            values = values.clone()
    return values


def as_images(images: Any, *, floats: bool = False) -> torch.Tensor:
    """Return images as an (N, C, H, W) tensor, uint8 or float in [0, 1] as given (never quantised).

    Args:
        images: a tensor, or an array or list of numbers; floats are clipped where rounding left them outside [0, 1].
        floats: refuse bytes.

    Raises:
        UserError: another shape or type, pixels that are not finite, or pixels outside [0, 1].
    """
    images = as_tensor(images, "images")
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "; pass images[:, None] for grey images, images[None] for a single one" if images.ndim == 3 else ""
        raise UserError(f"images have shape {shape}: expected a batch (N, C, H, W){hint}")
    if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) and min(shape[1:3]) >= 8:
        raise UserError(
            f"images have shape {shape}, with the channels last: expected (N, C, H, W); "
            "permute the axes with (0, 3, 1, 2)"
        )
    if 0 in shape[1:]:
        raise UserError(f"images have shape {shape}, which holds no pixels: expected (N, C, H, W)")
    if images.dtype == torch.uint8 and not floats:
        return images
    if not images.is_floating_point():
        how = "images.float()" if images.dtype == torch.bool else "images.float() / 255"
        raise UserError(f"images are {images.dtype}: expected floats in [0, 1]; pass {how}")
    if images.numel() == 0:
        return images
    low, high = torch.stack(torch.aminmax(images)).tolist()
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
