"""Items are read ahead of the compute: by worker processes of a DataLoader, or by threads of this process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gambeson.base.errors import UserError
from gambeson.data.conversion import as_images

Pair = tuple[torch.Tensor, torch.Tensor]
Fetch = Callable[[int], Pair]
"""Item number -> image (C, H, W), uint8 or float in [0, 1], and its label () or (H, W)."""

PIECE = 32
"""Images that a worker decodes at a time. Small, so that all workers share in the first batch, and that little lies
in the memory that they share with the main process, of which a container has 64 MB if nobody asks for more."""
MOST, FEWEST = 8, 4
"""Workers that a process starts of its own accord, and cores that it must have for that. A third of the work on a JPEG
holds Python's lock (measured: 300 x 300 pixels to 224 x 224), so that threads cannot keep a fourth core at work; on two
they were faster than workers, with an eighth less work in all."""


def default_workers() -> int:
    """Return how many workers read for this process: $GAMBESON_WORKERS, else one per core it may use, 8 at the most.

    Processes of one run on one machine share its cores. None (0: threads of this process read) with less than 4 cores,
    inside a process that may not have children, and on systems where starting one runs the user's script again.

    Raises:
        UserError: $GAMBESON_WORKERS is no whole number.
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
    """Load batches of items, the next ones while the caller computes on this one.

    The items and their order do not depend on the number of workers. These end with the walk, however it ends.

    Args:
        fetch: loads one item; runs in the workers.
        batches: item numbers, (M,) each, M at least 1.
        workers: processes that load; 0: threads of this process, one batch ahead.
        device: where the images go.

    Returns:
        For each batch its images (M, C, H, W) as they are stored, and on the CPU its labels (M,) or (M, H, W).

    Raises:
        UserError: as ``fetch``; shapes that differ; or a worker that was killed.
    """
    # A few pieces a worker at the least: starting one takes as long as decoding a dozen images.
    workers = min(workers, sum(_pieces(batch) for batch in batches) // 2)
    return _by_workers(fetch, batches, workers, device) if workers else _by_threads(fetch, batches, device)


def load_items(fetch: Fetch, numbers: Sequence[int]) -> Pair:
    """Load items now, by threads.

    Raises:
        UserError: as ``fetch``, or shapes that differ.
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
    # Torch raises the first from a signal handler: anywhere, not where a piece is asked for. The others come where a
    # piece was on its way.
    except (RuntimeError, ConnectionError, EOFError) as error:
        known = str(error).startswith("DataLoader worker (pid")
        if not known and (isinstance(error, RuntimeError) or str(error).startswith("Caught")):
            raise
        raise UserError(
            f"a process that reads images ended ({' '.join(str(error).split())}), as when memory or /dev/shm runs out: "
            "give it more, or use fewer processes by workers=1, or none by workers=0 (or $GAMBESON_WORKERS)"
        ) from None
    finally:
        # By hand, for a traceback that somebody keeps, as notebooks do, keeps frames and with them the iterator.
        coming._shutdown_workers()


def _next(coming: Iterator[Pair | UserError]) -> Pair:
    piece = next(coming)
    if isinstance(piece, UserError):
        raise piece
    return piece


class _Pieces(Dataset[Pair | UserError]):
    """What a worker runs."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, numbers: list[int]) -> Pair | UserError:
        try:
            return _stacked(map(self.fetch, numbers))
        except UserError as error:
            return error  # raised, it would arrive with the worker's traceback in its sentence


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
    """Refuse images that cannot stand in one tensor.

    Raises:
        UserError: shapes or types that differ.
    """
    kinds = sorted({(tuple(image.shape[-3:]), str(image.dtype).removeprefix("torch.")) for image in images})
    if len(kinds) > 1:
        (one, first), (other, last) = kinds[0], kinds[-1]
        raise UserError(
            f"images differ, {one} of {first} and {other} of {last} among them: expected one shape and one type; pass "
            "size=224 to resize and crop them, and convert them to one mode"
        )
