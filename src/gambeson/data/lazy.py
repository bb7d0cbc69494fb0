"""Splits too large for memory: the interface of a split, with items loaded on demand or prefetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch

from gambeson.base.errors import UserError
from gambeson.data.prefetch import Fetch, check_alike, default_workers, load_items, read_ahead
from gambeson.data.split import Batch, Indices, Split, delivered, moments
from gambeson.tasks import as_labels
from gambeson.tasks import of as task_of

SAMPLE = 10_000
"""Maximum number of images for the mean and standard deviation: reading all would cost as much as an epoch."""
MEMORY_LIMIT = 4 * 2**30
"""Maximum bytes of images kept in memory; larger sets stay on disk."""


class LazySplit(Split):
    """A split that loads its items on demand; it supports everything that :class:`Split` does except ``images``.

    Args:
        name: its name in reports.
        fetch: loads one item: number -> (image (C, H, W), label () or (H, W)); called from several threads and
            processes, and must be deterministic.
        labels: (N,); or the number of items N if labels are maps read with the images.
        classes: the class names.
        ignore_index: label that is ignored everywhere, or None.
        workers: processes that prefetch in :meth:`walk` and :meth:`batches`; 0: threads; None: :func:`default_workers`,
            evaluated at the start of each walk.

    Raises:
        UserError: no items, labels without a class, or as ``fetch``.
    """

    def __init__(
        self,
        name: str,
        fetch: Fetch,
        labels: torch.Tensor | int,
        classes: tuple[str, ...],
        ignore_index: int | None = None,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 0:
            raise UserError(f"workers = {workers}: expected a number of processes, 0 or more")
        count = labels if isinstance(labels, int) else len(labels)
        self.name, self.classes = name, tuple(classes)
        self._fetch, self._workers = fetch, workers
        self._items = torch.arange(count)
        self._known = None if isinstance(labels, int) else as_labels(labels)
        self._device = torch.device("cpu")
        if count == 0:
            raise UserError(f"{name} is empty: expected one image at the least")
        self._first, label = fetch(0)
        self.task = task_of(as_labels(label[None]) if self._known is None else self._known, ignore_index)
        if self._known is not None:
            self.task.check_labels(self._known, len(self.classes))

    @property
    def images(self) -> torch.Tensor:
        """Not supported: the images do not fit in memory; use :meth:`take` and :meth:`batches`."""
        raise UserError(
            f"the images of {self.name} do not fit in memory together: use take(indices), "
            "batches(batch_size) or a smaller subset(indices).eager()"
        )

    @property
    def labels(self) -> torch.Tensor:
        """Labels, int64 (N,); not supported for label maps, as for images."""
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
        """Size of all images in memory, in bytes."""
        return self._first.nbytes * len(self)

    @property
    def _strata(self) -> torch.Tensor | None:
        return self._known

    @property
    def _home(self) -> torch.device:
        return self._items.device

    def __len__(self) -> int:
        return len(self._items)

    def check_classes(self, count: int) -> None:
        """As that of :class:`Split`."""
        self.task.check_labels(torch.tensor(len(self.classes) - 1) if self._known is None else self._known, count)

    def eager(self) -> Split:
        """Load everything into a plain split."""
        images = self._first.new_empty(len(self), *self.shape)
        labels, at = [], 0
        for some, truths in self._chunks():
            images[at : at + len(some)] = some
            labels.append(truths)
            at += len(some)
        return Split(self.name, images, torch.cat(labels), self.classes, task=self.task)

    def walk(self, parts: Iterable[Indices], device: torch.device | str | None = None) -> Iterator[Batch]:
        """Take parts of the split in turn, prefetching the next ones while the caller computes.

        Each item is loaded once. The workers end with the walk, however it ends.
        """
        target = self.device if device is None else torch.device(device)
        for images, labels in self._read(parts, target):
            yield delivered(images, labels, target)

    def _rows(self, indices: Indices) -> Batch:
        items = self._items[self._index(indices)].tolist()
        if not items:
            label = self._known[:0] if self._known is not None else torch.empty(0, *self.shape[1:], dtype=torch.int64)
            return self._first.new_empty(0, *self.shape), label
        return self._checked(*load_items(self._fetch, items))

    def _read(self, parts: Iterable[Indices], device: torch.device) -> Iterator[Batch]:
        batches = [self._items[self._index(part)] for part in parts]
        workers = default_workers() if self._workers is None else self._workers
        for images, labels in read_ahead(self._fetch, batches, workers, device):
            yield self._checked(images, labels)

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return moments(self.sample(SAMPLE)._chunks(), self.shape[0])

    def _chunks(self) -> Iterator[Batch]:
        return self._read(self._slices(), torch.device("cpu"))

    def _checked(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        check_alike(images[:1], self._first[None])
        labels = as_labels(labels)
        self.task.check_labels(labels, len(self.classes))
        return images, labels

    def _select(self, indices: Indices) -> None:
        index = self._index(indices)
        self._items = self._items[index]
        self._known = None if self._known is None else self._known[index]

    def _move(self, device: torch.device) -> None:
        """Nothing to move: batches go to the device one by one."""


def settle(split: LazySplit) -> Split:
    """Return the split in memory if it is within :data:`MEMORY_LIMIT`, else unchanged."""
    return split.eager() if split.nbytes <= MEMORY_LIMIT else split
