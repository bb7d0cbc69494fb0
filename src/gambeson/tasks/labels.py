"""The door for images and labels: arrays of every usual form become tensors of one form, or are refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from gambeson.base import UserError
from gambeson.base.checks import as_images, as_tensor
from gambeson.base.errors import DataWarning
from gambeson.tasks.task import IGNORED, Segmentation, Task, create, of


def as_pair(
    images: Any,
    labels: Any,
    task: Task | str | None = None,
    ignore_index: int | None = None,
    *,
    floats: bool = False,
    stored: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Task]:
    """Return images with their labels, on the images' device, and the task of the labels.

    Args:
        images: (N, C, H, W), as :func:`gambeson.base.checks.as_images` takes them.
        labels: as :func:`as_labels` takes them.
        task: what the labels mean, by object or by name; by default the task that labels of this form belong to.
        ignore_index: the label that counts nowhere; only where no task is given.
        floats: refuse images of bytes.
        stored: keep label maps that come as bytes, an eighth of the memory.

    Returns:
        Images, uint8 or float; labels, int64 and (N,) or (N, H, W), or as the task has them; the task.

    Raises:
        UserError: images or labels of another form, labels of another task, different lengths or sizes, or a task as
            well as an ignore index.
    """
    images = as_images(images, floats=floats)
    if task is not None and ignore_index is not None:
        raise UserError(f"a task came with ignore_index = {ignore_index}: set the task's ignore_index")
    task = create(task) if isinstance(task, str) else task
    if not isinstance(task, Task | None):
        raise UserError(f"task is {task!r}: expected a task such as gb.tasks.Segmentation(), its name, or None")
    height, width = images.shape[2:]
    labels = as_labels(labels, task, (len(images), height, width), stored=stored).to(images.device)
    task = of(labels, ignore_index) if task is None else task
    if task.per_image_label or not 0 <= (task.ignore_index or 0) < 256:
        labels = labels.to(torch.int64)
    return images, labels, task


def as_labels(
    labels: Any, task: Task | None = None, fit: tuple[int, int, int] | None = None, *, stored: bool = False
) -> torch.Tensor:
    """Return labels as class indices, int64: (N,), (N, H, W), or the form of the task.

    Taken are tensors, arrays and lists of integers of every type, booleans, and floats that are whole numbers; in these
    forms, with another axis of length 1, (N, 1), (N, 1, H, W) or (N, H, W, 1), or one-hot, (N, K), (N, K, H, W) or
    (N, H, W, K).

    Args:
        labels: of a batch, or of a whole data set.
        task: what they mean, if known; labels that have its number of dimensions are not looked at further.
        fit: N, H and W of their images, if known.
        stored: keep bytes as they are.

    Raises:
        UserError: labels of another form, or labels that do not fit the task or the images.
    """
    values = as_tensor(labels, "labels")
    shape = tuple(values.shape)
    if values.ndim == 0 or (fit is not None and len(values) != fit[0]):
        count = "one number" if values.ndim == 0 else f"{len(values)} labels"
        raise UserError(
            f"{'images' if fit is None else f'{fit[0]} images'} came with {count}: expected one label or label map "
            "per image"
        )
    if values.is_complex() or (values.is_floating_point() and not bool((values.isfinite() & (values % 1 == 0)).all())):
        raise UserError(
            f"labels are {values.dtype}, and not all are whole numbers: expected class indices; of probabilities or "
            "scores per class (N, K), pass labels.argmax(1)"
        )
    values = values if stored and values.dtype == torch.uint8 else values.to(torch.int64)
    if task is None or values.ndim != task.label_dims:
        # Channels are last where only so the map has the size of its image.
        last = values.ndim == 4 and fit is not None and shape[1:3] == fit[1:] != shape[2:]
        values = _without_classes(values, 3 if last else 1) if values.ndim in (2, 4) else values
    expected = "(N,), one label per image, or (N, H, W), one per pixel" if task is None else task.label_form
    if values.ndim != task.label_dims if task is not None else values.ndim not in (1, 3):
        raise UserError(f"labels have shape {shape}: expected {expected}")
    is_map = values.ndim == 3 and (task is None or isinstance(task, Segmentation))
    if is_map and fit is not None and values.shape[1:] != fit[1:]:
        raise UserError(
            f"label maps of {values.shape[1]}x{values.shape[2]} pixels came with images of {fit[1]}x{fit[2]}: "
            "expected one size; resize the maps by nearest neighbour"
        )
    return values


def _without_classes(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Drop an axis of length 1, or read one-hot labels along it."""
    if values.shape[axis] == 1:
        return values.squeeze(axis)
    one = values == 1
    if values.shape[axis] and bool((one | (values == 0)).all()) and bool((one.sum(axis) == 1).all()):
        return values.argmax(axis)
    raise UserError(
        f"labels have shape {tuple(values.shape)} and are not one-hot: expected one class index per image (N,) or "
        "pixel (N, H, W); an image with several classes has no single label"
    )


def distinct(labels: torch.Tensor) -> torch.Tensor:
    """Return the distinct values of labels, ascending; counted rather than sorted where they are few."""
    if labels.numel() == 0:
        return labels.flatten()
    low, high = torch.aminmax(labels)
    if high - low > 2**16:
        return labels.unique()
    return torch.bincount(labels.flatten() - low).nonzero().flatten() + low


def find_ignored(values: torch.Tensor) -> int | None:
    """Return the label that marks unlabelled pixels among the distinct ``values`` of label maps, or None.

    255 counts as a class if the maps use most labels below it, and as a foreground beside 0 alone.
    """
    present = values.tolist()
    for ignored in IGNORED:
        if ignored in present and (ignored < 0 or len(present) < 128) and present != MASK:
            return ignored
    return None


MOST_CLASSES = 10**6
"""Labels above are identifiers, not class indices."""
_STEP = 10
"""Labels that are multiples of so large a number may be no class indices (ours)."""
MASK = [0, 255]
"""The values of a binary mask in an image file."""


def is_mask(values: torch.Tensor) -> bool:
    """Tell whether the distinct ``values`` of labels are those of a binary mask; warn of how it is read."""
    if values.tolist() != MASK:
        return False
    warnings.warn(
        "the labels are 0 and 255 only: 255 is read as class 1, a foreground; if it marks what has no label, "
        "give gb.data.Split(..., ignore_index=255)",
        DataWarning,
        stacklevel=2,
    )
    return True


def class_names(values: torch.Tensor, ignore_index: int | None) -> tuple[str, ...]:
    """Return the names "0", "1", ... up to the highest of the distinct labels, at least two.

    Warns if labels seem to start at 1.

    Raises:
        UserError: labels that are no class indices.
    """
    present = [value for value in values.tolist() if value != ignore_index]
    highest = max(present, default=0)
    if highest >= MOST_CLASSES:
        raise UserError(
            f"labels reach {highest}: expected class indices; renumber them, labels.unique(return_inverse=True)[1]"
        )
    if len(present) > 1 and present == list(range(1, highest + 1)):
        warnings.warn(
            f"labels run from 1 to {highest}: they are read as classes 1 to {highest}, and class 0 has no image; if "
            "they start at 1, pass labels - 1",
            DataWarning,
            stacklevel=2,
        )
    elif (step := math.gcd(*present)) >= _STEP:
        warnings.warn(
            f"all labels are multiples of {step}: they make {highest + 1} classes, of which {len(present)} have "
            f"images; if they are levels of grey rather than class indices, pass labels // {step}",
            DataWarning,
            stacklevel=2,
        )
    return tuple(str(label) for label in range(max(2, highest + 1)))
