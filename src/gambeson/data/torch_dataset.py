"""Splits from a torch.utils.data.Dataset: in memory if it fits, else lazy."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from gambeson.base.checks import as_tensor
from gambeson.base.errors import DataWarning, UserError
from gambeson.data.lazy import LazySplit, settle
from gambeson.data.pictures import Decoder, fit
from gambeson.data.split import Batch, Split
from gambeson.tasks.labels import as_labels, class_names, find_ignored, is_mask


class Items:
    """Loads items of a torch Dataset as (image (C, H, W), label () or (H, W)).

    Args:
        source: a map-style Dataset; its items are (PIL image, array or tensor, label or label map).
        decode: turns PIL images into tensors; images and maps get its size.
        masks: whether label maps are masks of 0 and 255, which are read as 0 and 1.
    """

    def __init__(self, source: Any, decode: Decoder, masks: bool = False) -> None:
        self.source, self.decode, self.masks = source, decode, masks

    def __call__(self, number: int) -> Batch:
        """Load one item."""
        try:
            item = self.source[number]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = f"item {number} of the data set cannot be read ({error}): replace or remove its file"
            raise UserError(reason) from None
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"item {number} of the data set is a {type(item).__name__}: expected a pair (image, label)")
        image = self._image(item[0], f"item {number}")
        label = as_labels(as_tensor(item[1], "an item's labels")[None])[0]
        if label.ndim:
            label = fit(label.clamp(max=1) if self.masks else label, self.decode.size, nearest=True)
        return fit(image, self.decode.size), label

    def _image(self, image: Any, what: str) -> torch.Tensor:
        """Return one image as (C, H, W), uint8 or float."""
        if isinstance(image, Image.Image):
            return self.decode(image, what)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy())
        if not isinstance(image, torch.Tensor) or image.ndim not in (2, 3):
            shape = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise UserError(f"an item's image is {shape}: expected a PIL image or a tensor (C, H, W)")
        return image if image.ndim == 3 else image[None]


@dataclass(frozen=True)
class Survey:
    """Metadata of a torch Dataset, known before its images are read."""

    fetch: Items
    count: int
    labels: torch.Tensor | None
    """(N,); None if the labels are maps, which are read with the images."""
    values: torch.Tensor
    """The distinct labels."""
    names: tuple[str, ...]
    """Class names of the source; possibly empty."""

    def split(self, name: str, classes: tuple[str, ...], ignore_index: int | None, workers: int | None) -> LazySplit:
        """Return the split that reads the items."""
        labels = self.count if self.labels is None else self.labels
        return LazySplit(name, self.fetch, labels, classes, ignore_index, workers)


def survey(source: Any, decode: Decoder, kept: tuple[str, ...] = ("targets",), classes: tuple[str, ...] = ()) -> Survey:
    """Inspect a torch Dataset; all items are read if it does not store their labels.

    Args:
        source: a map-style Dataset.
        decode: as for :class:`Items`.
        kept: names of attributes that may store all labels.
        classes: class names, if known, so that label maps need not be read.

    Raises:
        UserError: it is empty or has no length, or its items are not (image, label).
    """
    try:
        count = len(source)
    except TypeError:
        raise UserError("the torch Dataset has no length: expected a map-style data set, not a stream") from None
    if count == 0:
        raise UserError("the torch Dataset is empty: expected one image at the least")
    fetch = Items(source, decode)
    _, first = fetch(0)
    if decode.size is not None:
        height, width = Items(source, replace(decode, size=None))(0)[0].shape[-2:]
        if height < decode.size[0] or width < decode.size[1]:
            wanted = "x".join(map(str, decode.size))
            warnings.warn(f"the first image is {height}x{width}: enlarged to {wanted}", DataWarning, stacklevel=2)
    labels = next((found for name in kept if (found := _targets(source, fetch, name)) is not None), None)
    if labels is not None:
        values = labels.unique()
    elif first.ndim and classes:
        values = torch.arange(len(classes))
    else:
        labels, values = _read_labels(fetch, count)
    named = getattr(source, "classes", None) or getattr(source, "categories", None)
    names = map(_spelt, named) if isinstance(named, list | tuple) else ()
    return Survey(fetch, count, labels, values, tuple(names))


def from_items(source: Any, decode: Decoder, name: str, workers: int | None = None) -> Split:
    """Build a split from a torch Dataset; several threads or processes read its items, which must be deterministic.

    Raises:
        UserError: as :func:`survey`; or items of different shapes.
    """
    found = survey(source, decode)
    if found.labels is None and is_mask(found.values):
        found = replace(found, fetch=Items(source, decode, masks=True), values=torch.arange(2))
    ignored = find_ignored(found.values) if found.labels is None else None
    classes = class_names(found.values, ignored)
    if len(found.names) >= len(classes):
        classes = found.names
    return settle(found.split(name, classes, ignored, workers))


def _spelt(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)  # ImageNet's names include synonyms


def _targets(source: Any, fetch: Items, name: str) -> torch.Tensor | None:
    """Return the labels that a data set stores as ``name``, if they agree with the items."""
    targets = getattr(source, name, None)
    if targets is None or getattr(source, "target_transform", None) is not None:
        return None
    try:
        if isinstance(targets[0], tuple):  # (file, label)
            targets = [label for _, label in targets]
        labels = as_labels(targets)
    except (TypeError, ValueError, LookupError):
        return None
    if labels.shape != (len(source),) or any(not torch.equal(fetch(at)[1], labels[at]) for at in (0, len(source) - 1)):
        return None
    return labels


def _read_labels(fetch: Items, count: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Read every item once for its label; return the labels, or None for maps, and their distinct values."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda number: _brief(fetch(number)[1]), range(count)))
    if len({entry.ndim for entry in found}) > 1:
        raise UserError("some items have one label and others a label map: expected one form in all")
    values = torch.cat([entry.flatten() for entry in found]).unique()
    return (None if found[0].ndim else torch.stack(found)), values


def _brief(label: torch.Tensor) -> torch.Tensor:
    return label if label.ndim == 0 else label.unique()
