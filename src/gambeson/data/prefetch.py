"""Prefetching of items, by worker processes of a DataLoader or by threads of this process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gambeson.base.checks import as_images
from gambeson.base.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]
Fetch = Callable[[int], Pair]
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


def read_ahead(fetch: Fetch, batches: Sequence[torch.Tensor], workers: int, device: torch.device) -> Iterator[Pair]:
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


def load_items(fetch: Fetch, numbers: Sequence[int]) -> Pair:
    """Load items now, with threads.

    Raises:
        UserError: as ``fetch``, or different shapes.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1, len(numbers))) as pool:
        return _stacked(pool.map(fetch, numbers))


def _by_threads(fetch: Fetch, batches: Sequence[torch.Tensor], device: torch.device) -> Iterator[Pair]:
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(load_items, fetch, batch.tolist()) for batch in batches[:1]]
        for batch in [*batches[1:], None]:
            images, labels = coming.pop().result()
            if batch is not None:
                coming.append(ahead.submit(load_items, fetch, batch.tolist()))
            yield images.to(device), labels


def _by_workers(fetch: Fetch, batches: Sequence[torch.Tensor], workers: int, device: torch.device) -> Iterator[Pair]:
    pinned = torch.cuda.is_available() and device.type != "cpu"
    loader: Any = DataLoader(
        _Pieces(fetch),
        batch_size=None,
        sampler=_Cut(batches),
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


def _next(coming: Iterator[Pair | UserError]) -> Pair:
    piece = next(coming)
    if isinstance(piece, UserError):
        raise piece
    return piece


class _Pieces(Dataset[Pair | UserError]):
    """The data set that workers iterate over."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, numbers: list[int]) -> Pair | UserError:
        try:
            return _stacked(map(self.fetch, numbers))
        except UserError as error:
            return error  # raising it would add the worker's traceback to the message


class _Cut:
    """The batches, cut into pieces."""

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield from (piece.tolist() for piece in batch.split(PIECE))


def _pieces(batch: torch.Tensor) -> int:
    return -(-len(batch) // PIECE)


def _same(piece: Any) -> Any:
    return piece


def _stacked(items: Iterable[Pair]) -> Pair:
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
