"""CUDA graphs of a repeated computation: one launch in place of hundreds, with the numbers of the calls it replaces."""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gambeson.base import seeded

Job = Callable[..., tuple[torch.Tensor, ...]]
EAGER = 2
"""Calls of the same shapes that are computed one kernel after another before a graph is captured."""
MOST = 12
"""Graphs kept per model; the one that was used least recently is dropped."""
DIGITS = 3
"""Binary digits of the numbers of images that graphs are made for: at most a quarter, on average a twelfth more than
there are images."""
_WAITED = "synchronizing CUDA operation"


class NotRepeatableError(Exception):
    """The computation waits for the device or draws random numbers, which a graph would not repeat."""


class Graph:
    """A captured computation with static inputs.

    Args:
        job: a function of tensors alone, to tensors.
        tensors: example inputs.
        pool: memory pool of the graphs that are replayed on the same stream.
        tally: what the job counts, such as images sent forward; its increments are not repeated by a replay.
        settings: of the modules; a job that changes them is not repeatable.

    Raises:
        NotRepeatableError: see there.
    """

    def __init__(
        self,
        job: Job,
        tensors: Sequence[torch.Tensor],
        pool: Any,
        tally: Callable[[], tuple[int, ...]],
        settings: Callable[[], Hashable],
    ) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self._lock = threading.Lock()
        here, side = torch.cuda.current_stream(), _side(torch.cuda.current_device())
        side.wait_stream(here)
        with seeded(0, "graph"):
            with torch.cuda.stream(side):
                before = draws(), settings()
                with no_waits():
                    job(*self.inputs)
                if (draws(), settings()) != before:
                    raise NotRepeatableError("the model draws random numbers or changes its settings")
            here.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            counted = tally()
            # Another thread, such as a prefetching one, may use the device during the capture.
            capture = torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local")
            with undone_on_error(here, pool), capture:
                self.outputs = job(*self.inputs)
        self.counts = tuple(after - earlier for after, earlier in zip(tally(), counted, strict=True))

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Compute the job on other tensors of the same shapes."""
        with self._lock:
            for static, tensor in zip(self.inputs, tensors, strict=True):
                static.copy_(tensor)
            self.graph.replay()
            return tuple(output.clone() for output in self.outputs)  # overwritten by the next replay


class Graphs:
    """The graphs of one model's weights, which may change in place.

    Attributes:
        refused: why nothing is captured, or None.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._most = 0
        self._seen: Counter[Hashable] = Counter()
        self._made: OrderedDict[Hashable, Graph] = OrderedDict()
        self._pools: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def size_for(self, images: int) -> int:
        """Return how many images to compute so many with: rounded up, but never above the most so far."""
        self._most = max(self._most, images)
        unit = 1 << max(0, images.bit_length() - DIGITS)
        return min(self._most, -(-images // unit) * unit)

    def find(
        self,
        what: Hashable,
        job: Job,
        tensors: Sequence[torch.Tensor],
        tally: Callable[[], tuple[int, ...]],
        settings: Callable[[], Hashable],
    ) -> Graph | None:
        """Return the graph of a job, captured at the third call with these shapes; None: call the job itself.

        Args:
            what: what the job computes; equal for equal functions.
            job: see :class:`Graph`, as are the others.
            tensors: its inputs.
            tally: its counts.
            settings: of the modules.
        """
        if self.refused is not None or torch.is_inference_mode_enabled() or torch.cuda.is_current_stream_capturing():
            return None
        if _get_current_dispatch_mode() is not None:  # it sees, and perhaps counts, every operation
            return None
        stream = _stream()
        key = (what, ambient(), stream, *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if (known := self._made.get(key)) is not None:
            self._made.move_to_end(key)
            return known
        self._seen[key] += 1
        if self._seen[key] <= EAGER:
            return None
        try:
            if stream not in self._pools:
                self._pools[stream] = torch.cuda.graph_pool_handle()
            self._made[key] = Graph(job, tensors, self._pools[stream], tally, settings)
        except Exception as error:  # whatever cannot be captured is computed kernel by kernel
            self.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if not isinstance(error, NotRepeatableError):
                warnings.warn(f"gradients are computed without a CUDA graph ({self.refused})", stacklevel=2)
            return None
        if len(self._made) > MOST:
            self._made.popitem(last=False)
        return self._made[key]

    def clear(self) -> None:
        """Drop the graphs, because the tensors they work on have been replaced."""
        self._made.clear()
        self._seen.clear()


def has_graphs(device: torch.device) -> bool:
    """Whether computations on this device can be captured."""
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def _side(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: each stream keeps a workspace of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def undone_on_error(here: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Undo what torch leaves behind when a capture fails: its stream, its pool and the generator in capture mode."""
    try:
        yield
    except Exception:
        torch.cuda.set_stream(here)
        with suppress(RuntimeError):  # the pool has been closed where the capture could be ended
            torch._C._cuda_endAllocateToPool(here.device_index, pool)
        generator = torch.cuda.default_generators[here.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def ambient() -> Hashable:
    """Settings of torch that a graph keeps as they were at its capture."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        (convolutions.deterministic, convolutions.benchmark, convolutions.allow_tf32, products.allow_tf32),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )


def draws() -> Hashable:
    """The states of the global generators."""
    states = (torch.get_rng_state(), torch.cuda.get_rng_state())
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    return (*(bytes(state.numpy()) for state in states), python, repr(numpy))


@contextmanager
def no_waits() -> Iterator[None]:
    """Refuse a block in which the host waits for the device.

    Raises:
        NotRepeatableError: it waited.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if any(_WAITED in str(warning.message) for warning in caught):
        raise NotRepeatableError("the model waits for the device")
