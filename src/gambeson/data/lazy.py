"""Splits too large for memory: the interface of a split, with items loaded on demand or prefetched.

Prefetching is done by worker processes of a DataLoader, or by threads of this process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gambeson.base.checks import as_images
from gambeson.base.errors import UserError
from gambeson.data.split import Batch, Indices, Split, delivered, digests, moments, one_class
from gambeson.tasks import as_labels
from gambeson.tasks import of as task_of

SAMPLE = 10_000
"""Maximum number of images for the mean and standard deviation: reading all would cost as much as an epoch."""
SIGNED = 100
"""Maximum number of images that a resumed run reads of a split to know it again (ours)."""
MEMORY_LIMIT = 4 * 2**30
"""Maximum bytes of images kept in memory; larger sets stay on disk."""
Fetch = Callable[[int], Batch]
"""Item number -> image (C, H, W), uint8 or float in [0, 1], and its label () or (H, W)."""

PIECE = 32
"""Images that a worker decodes at a time. Small, so that all workers share the first batch, and that little is held in
shared memory, which is 64 MB by default in a container."""
MOST, FEWEST = 8, 4
"""Default maximum of workers, and the number of cores from which workers are used. A third of the decoding of a JPEG
holds Python's lock (measured: 300 x 300 pixels to 224 x 224), so threads cannot use a fourth core; on two cores they
were faster than workers, with an eighth less work in total."""


def default_workers() -> int:
    """Return the number of workers of this process: $GAMBESON_WORKERS, else one per usable core, at most 8.

    Processes of one run on one machine share its cores. It is 0 (threads) with fewer than 4 cores, inside daemonic
    processes, and on systems where starting a process runs the user's script again.

    Raises:
        UserError: $GAMBESON_WORKERS is not an integer.
    """
    given = os.environ.get("GAMBESON_WORKERS", "").strip()
    if given:
        if not given.isdecimal():
            raise UserError(f"$GAMBESON_WORKERS is {given!r}: expected a number of processes, 0 or more")
        return int(given)
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    mine = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if mine < FEWEST else min(MOST, mine)


def read_ahead(fetch: Fetch, batches: Sequence[torch.Tensor], workers: int, device: torch.device) -> Iterator[Batch]:
    """Load batches of items, prefetching the next ones while the caller computes.

    The items and their order do not depend on the number of workers, which end with the iterator however it ends.

    Args:
        fetch: loads one item; runs in the workers.
        batches: item numbers, (M,) each, with M >= 1.
        workers: processes that load; 0: threads of this process, one batch ahead.
        device: where the images go.

    Returns:
        For each batch its images (M, C, H, W) as stored, and its labels (M,) or (M, H, W) on the CPU.

    Raises:
        UserError: as ``fetch``; different shapes; or a worker that was killed.
    """
    # At least a few pieces per worker: starting one takes as long as decoding a dozen images.
    workers = min(workers, sum(_pieces(batch) for batch in batches) // 2)
    return _by_workers(fetch, batches, workers, device) if workers else _by_threads(fetch, batches, device)


def load_items(fetch: Fetch, numbers: Sequence[int]) -> Batch:
    """Load items now, with threads.

    Raises:
        UserError: as ``fetch``, or different shapes.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1, len(numbers))) as pool:
        return _stacked(pool.map(fetch, numbers))


def _by_threads(fetch: Fetch, batches: Sequence[torch.Tensor], device: torch.device) -> Iterator[Batch]:
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(load_items, fetch, batch.tolist()) for batch in batches[:1]]
        for batch in [*batches[1:], None]:
            images, labels = coming.pop().result()
            if batch is not None:
                coming.append(ahead.submit(load_items, fetch, batch.tolist()))
            yield images.to(device), labels


def _by_workers(fetch: Fetch, batches: Sequence[torch.Tensor], workers: int, device: torch.device) -> Iterator[Batch]:
    pinned = torch.cuda.is_available() and device.type != "cpu"
    loader: Any = DataLoader(
        _Pieces(fetch),
        batch_size=None,
        sampler=(piece.tolist() for batch in batches for piece in batch.split(PIECE)),
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pinned,
        prefetch_factor=max(2, -(-2 * _pieces(batches[0]) // workers)),  # two batches ahead, all workers together
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator(),  # it draws a seed for the workers, which would move the run's own draws
    )
    coming = iter(loader)
    try:
        for batch in batches:
            pieces = [_next(coming) for _ in range(_pieces(batch))]
            check_alike(*(images[:1] for images, _ in pieces))
            images = torch.cat([images.to(device, non_blocking=pinned) for images, _ in pieces])
            yield images, torch.cat([labels for _, labels in pieces])
    # Torch raises the first from a signal handler, at any point; the others come while waiting for a piece.
    except (RuntimeError, ConnectionError, EOFError) as error:
        known = str(error).startswith("DataLoader worker (pid")
        if not known and (isinstance(error, RuntimeError) or str(error).startswith("Caught")):
            raise
        raise UserError(
            f"a process that reads images ended ({' '.join(str(error).split())}), as when memory or /dev/shm runs out: "
            "give it more, or use fewer processes by workers=1, or none by workers=0 (or $GAMBESON_WORKERS)"
        ) from None
    finally:
        # Explicitly, because a stored traceback, as in notebooks, keeps frames and with them the iterator.
        coming._shutdown_workers()


def _next(coming: Iterator[Batch | UserError]) -> Batch:
    piece = next(coming)
    if isinstance(piece, UserError):
        raise piece
    return piece


class _Pieces(Dataset[Batch | UserError]):
    """The data set that workers iterate over."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, numbers: list[int]) -> Batch | UserError:
        try:
            return _stacked(map(self.fetch, numbers))
        except UserError as error:
            return error  # raising it would add the worker's traceback to the message


def _pieces(batch: torch.Tensor) -> int:
    return -(-len(batch) // PIECE)


def _same(piece: Any) -> Any:
    return piece


def _stacked(items: Iterable[Batch]) -> Batch:
    images, labels = zip(*items, strict=True)
    check_alike(*images)
    return as_images(torch.stack(images)), torch.stack([torch.as_tensor(label) for label in labels])


def check_alike(*images: torch.Tensor) -> None:
    """Raise unless the images can be stacked into one tensor.

    Raises:
        UserError: different shapes or types.
    """
    kinds = sorted({(tuple(image.shape[-3:]), str(image.dtype).removeprefix("torch.")) for image in images})
    if len(kinds) > 1:
        (one, first), (other, last) = kinds[0], kinds[-1]
        raise UserError(
            f"images differ, {one} of {first} and {other} of {last} among them: expected one shape and one type; pass "
            "size=224 to resize and crop them, and convert them to one mode"
        )


class LazySplit(Split):
    """A split that loads its items on demand; it supports everything that :class:`Split` does except ``images``.

    Args:
        name: its name in reports.
        fetch: loads one item: number -> (image (C, H, W), label () or (H, W)); called from several threads and
            processes, and must be deterministic. Maps of bytes stay bytes in memory.
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
        self._bytes = self._known is None and label.dtype == torch.uint8
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
        """Size of all images in memory with their label maps, in bytes."""
        maps = self._first[0].numel() if self.maps else 0  # a byte per pixel
        return (self._first.nbytes + maps) * len(self)

    @property
    def single_class(self) -> bool:
        """As that of :class:`Split`; False for label maps, which are not in memory."""
        return self._known is not None and one_class(self.task, self._known)

    @property
    def unlabelled(self) -> int:
        """As that of :class:`Split`; 0 for label maps, which are not in memory."""
        return 0 if self._known is None else len(self) - int(self.task.labelled(self._known).sum())

    @property
    def sign(self) -> str:
        """As that of :class:`Split`, of all labels that are in memory, and of images spread over the split."""
        images, labels = self._rows(torch.arange(0, len(self), -(-len(self) // SIGNED)))
        return digests([(images, labels if self._known is None else self._known)], len(self))[0]

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
            labels.append(truths.to(torch.uint8) if self._bytes else truths)
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
