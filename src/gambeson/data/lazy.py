"""A split too large for memory: the same interface, with items loaded by threads when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gambeson.base.checks import check_labels
from gambeson.base.errors import UserError
from gambeson.data.arrays import as_images, as_labels
from gambeson.data.split import Batch, Indices, Split

MEMORY_LIMIT = 4 * 2**30
"""Bytes of images that are kept in memory; a larger set stays on disk."""

Fetch = Callable[[int], Batch]
"""Item number -> image (C, H, W), uint8 or float in [0, 1], and its label () or (H, W)."""


class LazySplit(Split):
    """A split that loads its items on demand; every method of :class:`Split` works, ``images`` apart.

    Args:
        name: what reports call it.
        fetch: loads one item; called from several threads at once, and must give the same item every time.
        labels: (N,), known beforehand; or the number of items N, when labels are maps read with the images.
        classes: the class names.
        ignore_index: a label that counts nowhere, or None.
    """

    def __init__(
        self,
        name: str,
        fetch: Fetch,
        labels: torch.Tensor | int,
        classes: tuple[str, ...],
        ignore_index: int | None = None,
    ) -> None:
        count = labels if isinstance(labels, int) else len(labels)
        self.name, self.classes, self.ignore_index = name, tuple(classes), ignore_index
        self._fetch = fetch
        self._items = torch.arange(count)
        self._known = None if isinstance(labels, int) else as_labels(labels)
        self._device = torch.device("cpu")
        if self._known is not None:
            check_labels(self._known, len(self.classes), ignore_index)
        if count == 0:
            raise UserError(f"{name} is empty: expected one image at the least")
        self._first = fetch(0)[0]

    @property
    def images(self) -> torch.Tensor:
        """Refused: the images do not fit; :meth:`take` and :meth:`batches` load the ones that are needed."""
        raise UserError(
            f"the images of {self.name} are too large to stand in memory together: use take(indices), "
            "batches(batch_size) or a smaller subset(indices).eager()"
        )

    @property
    def labels(self) -> torch.Tensor:
        """Labels, int64 (N,); label maps are refused as images are."""
        if self._known is None:
            return self.images
        return self._known

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self._first.shape
        return channels, height, width

    @property
    def maps(self) -> bool:
        """Whether the labels are maps, which are read with the images."""
        return self._known is None

    @property
    def nbytes(self) -> int:
        """Bytes that all images would take in memory."""
        return self._first.nbytes * len(self)

    @property
    def _home(self) -> torch.device:
        return self._items.device

    def __len__(self) -> int:
        return len(self._items)

    def eager(self) -> Split:
        """Load everything, once, into a plain split."""
        return Split(self.name, *self._rows(slice(None)), self.classes, self.ignore_index)

    def _rows(self, indices: Indices) -> Batch:
        items = self._items[self._index(indices)].tolist()
        if not items:
            label = self._known[:0] if self._known is not None else torch.empty(0, *self.shape[1:], dtype=torch.int64)
            return self._first.new_empty(0, *self.shape), label
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1, len(items))) as pool:
            images, labels = zip(*pool.map(self._fetch, items), strict=True)
        return stack(images), self._checked(torch.stack([torch.as_tensor(label) for label in labels]))

    def _checked(self, labels: torch.Tensor) -> torch.Tensor:
        labels = as_labels(labels)
        check_labels(labels, len(self.classes), self.ignore_index)
        return labels

    def _walk(self, parts: list[Indices], device: torch.device | str | None) -> Iterator[Batch]:
        # The next batch is read while the caller computes on this one.
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(self.take, part, device) for part in parts[:1]]
            for part in [*parts[1:], None]:
                batch = coming.pop().result() if coming else None
                if part is not None:
                    coming.append(ahead.submit(self.take, part, device))
                if batch is not None:
                    yield batch

    def _select(self, indices: Indices) -> None:
        index = self._index(indices)
        self._items = self._items[index]
        self._known = None if self._known is None else self._known[index]

    def _move(self, device: torch.device) -> None:
        """Nothing to move: batches go to the device one by one."""


def stack(images: Any) -> torch.Tensor:
    """Stack images (C, H, W) of one shape to (N, C, H, W), checked.

    Raises:
        UserError: shapes that differ, or pixels that are not uint8 or float in [0, 1].
    """
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise UserError(
            f"images differ in shape, {shapes[0]} and {shapes[-1]} among them: expected one shape; pass "
            "size=224 "
            "to resize and crop them, and convert them to one mode"
        )
    return as_images(torch.stack(tuple(images)))


def settle(split: LazySplit, total_bytes: int | None = None) -> Split:
    """Return the split in memory, if its data set is within :data:`MEMORY_LIMIT`, else as it is."""
    return split.eager() if (total_bytes or split.nbytes) <= MEMORY_LIMIT else split
