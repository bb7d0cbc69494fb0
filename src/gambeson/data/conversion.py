"""Conversion of arrays, pairs and label maps to tensors of the expected shapes, with errors that say what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gambeson.base.checks import check_images
from gambeson.base.errors import UserError

IGNORED = (255, -1, -100)
"""Labels commonly used for unlabelled pixels: VOC and Cityscapes masks, exporters, torch's default."""


def as_images(images: Any) -> torch.Tensor:
    """Return images as an (N, C, H, W) tensor, uint8 or float in [0, 1] as given (never quantised).

    Raises:
        UserError: another shape or type, pixels that are not finite, or pixels outside [0, 1].
    """
    images = _tensor(images, "images")
    if images.ndim == 3:
        raise UserError(
            f"images have shape {tuple(images.shape)}: expected (N, C, H, W); "
            "pass images[:, None] for grey images, images[None] for a single one"
        )
    if images.ndim == 4 and images.shape[3] == 3 and min(images.shape[1:3]) >= 8:
        raise UserError(
            f"images have shape {tuple(images.shape)}, with the channels last: expected (N, C, H, W); "
            "permute the axes with (0, 3, 1, 2)"
        )
    if images.dtype != torch.uint8 or images.ndim != 4:
        images = check_images(images)
    if 0 in images.shape[1:]:
        raise UserError(f"images have shape {tuple(images.shape)}, which holds no pixels: expected (N, C, H, W)")
    return images


def as_labels(labels: Any) -> torch.Tensor:
    """Return labels as an int64 tensor, (N,) or (N, H, W).

    Raises:
        UserError: not integers, or another number of dimensions.
    """
    labels = _tensor(labels, "labels")
    if labels.ndim == 2:
        raise UserError(
            f"labels have shape {tuple(labels.shape)}: expected (N,) or (N, H, W); pass labels.argmax(1) if one-hot"
        )
    if labels.ndim not in (1, 3):
        raise UserError(f"labels have shape {tuple(labels.shape)}: expected (N,) or (N, H, W)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"labels are {labels.dtype}: expected integers from 0; convert them to int64")
    return labels.to(torch.int64)


def as_pair(images: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matching images and labels, on the images' device.

    Raises:
        UserError: as :func:`as_images` and :func:`as_labels`; or different lengths or sizes.
    """
    images = as_images(images)
    labels = as_labels(labels).to(images.device)
    if len(images) != len(labels):
        raise UserError(
            f"{len(images)} images came with {len(labels)} labels: expected one label or label map per image"
        )
    if labels.ndim == 3 and labels.shape[1:] != images.shape[2:]:
        sizes = [f"{of.shape[-2]}x{of.shape[-1]}" for of in (labels, images)]
        raise UserError(f"label maps of {sizes[0]} pixels came with images of {sizes[1]}: expected one size")
    return images, labels


def find_ignored(values: torch.Tensor) -> int | None:
    """Return the label that marks unlabelled pixels among the distinct ``values`` of label maps, or None.

    255 counts as a class only if the maps use most labels below it.
    """
    present = values.tolist()
    for ignored in IGNORED:
        if ignored in present and (ignored < 0 or len(present) < 128):
            return ignored
    return None


def class_names(labels: torch.Tensor, ignore_index: int | None) -> tuple[str, ...]:
    """Return the names "0", "1", ... up to the highest label, at least two."""
    valid = labels if ignore_index is None else labels[labels != ignore_index]
    return tuple(str(label) for label in range(max(2, int(valid.max()) + 1 if valid.numel() else 0)))


def _tensor(values: Any, what: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    if isinstance(values, np.ndarray | list | tuple | np.generic):
        try:
            array = np.asarray(values)
            if array.dtype.kind in "iu" and array.dtype != np.uint8:
                array = array.astype(np.int64)  # torch does not support every unsigned type
            if not (array.flags.writeable and array.flags.c_contiguous):
                array = array.copy()  # a tensor may not share memory that is read-only or strided backwards
            return torch.as_tensor(array)
        except (TypeError, ValueError) as error:
            raise UserError(f"{what} cannot become one tensor ({error}): expected numbers of one shape") from None
    raise UserError(f"{what} are a {type(values).__name__}: expected a torch tensor or a numpy array")
