"""Measurements on an accelerator within a few minutes, in order of importance, stored as they are made.

Each part appends its results to one file of JSON lines immediately, so that nothing is lost when time is up. A part
that fails stores its error, and the next one runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gambeson.base import Config, environment
from gambeson.data import Dataset, load
from gambeson.data.pieces import load_available
from gambeson.data.registry import DATASETS

GIB = 2**30


class Visit(Config):
    """Settings of a visit; the defaults are for an accelerator."""

    data: str = "cifar10"
    """Of what there is of it, see :func:`gambeson.data.pieces.load_available`."""
    model: str = "resnet18"
    eps: float = 8 / 255
    """Of training, and of the first audit."""
    audited: tuple[float, ...] = (8 / 255, 10 / 255)
    """Radii of the universal perturbations that models are audited with."""
    batch_size: int = 512
    lr: float = 0.2
    epochs: tuple[int, int] = (10, 20)
    """Minimum and maximum epochs of a training, chosen so that every defence fits."""
    craft_steps: int = 7
    """Of the inner attack of PGD adversarial training."""
    uap_steps: int = 200
    uap_batch: int = 256
    """Steps and images per restart of the audits' universal attack; two restarts, from zero and from random signs."""
    pgd_images: int = 2000
    """Test images for per-image attacks."""
    pgd_steps: int = 20
    bench_batches: tuple[int, ...] = (512, 128)
    segmented: tuple[str, ...] = ("torchvision:deeplabv3_resnet50", "torchvision:fcn_resnet50")
    """Networks of the segmentation benchmark."""
    segmented_side: int = 512
    segmented_batch: int = 8
    segmented_steps: int = 10
    rounds: int = 5
    matrix: int = 8192
    """Side of the matrices whose product is timed."""
    copied: int = 2**31
    """Bytes of the copied tensor."""
    low: bool = True
    """Whether bfloat16 is used: in training, crafting and the benchmarks; verdicts are always in float32."""
    device: str
    seeds: int = 3
    """Runs of each defence; every defence has its first before any has a second."""
    seed: int = 0
    judged: str = "pgd-adversarial"
    """Defence whose first model is also given the audit ``suite``, timed, at the end, for which ``judging`` seconds are
    kept."""
    suite: str = "standard"
    judging: float = 190.0

    @property
    def precision(self) -> str:
        """What models are trained and attacked in."""
        return "bfloat16" if self.low else "float32"


def tiny(device: str) -> Visit:
    """A rehearsal on 8 x 8 digits, in seconds; its numbers are meaningless."""
    return Visit(
        data="digits",
        model="lenet5",
        eps=0.1,
        audited=(0.1,),
        batch_size=64,
        lr=0.05,
        epochs=(1, 1),
        craft_steps=1,
        uap_steps=2,
        uap_batch=16,
        pgd_images=32,
        pgd_steps=2,
        bench_batches=(4,),
        segmented=("unet-smallx0.5",),
        segmented_side=16,
        segmented_batch=2,
        segmented_steps=2,
        rounds=3,
        matrix=64,
        copied=2**16,
        low=False,
        seeds=1,
        judged="",
        suite="quick",
        judging=0.0,
        device=device,
    )


class Notebook:
    """The file of JSON lines, and the clock.

    Args:
        path: the file; lines are appended.
        seconds: time limit from now.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def note(self, kind: str, **values: Any) -> None:
        """Append one line, flushed to disk, and print a short form."""
        line = json.dumps({"kind": kind, **values}, sort_keys=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"[{self.left:4.0f} s left] {line[:160]}", flush=True)

    def lines(self) -> list[dict[str, Any]]:
        """What is in the file so far."""
        return read_lines(self.path)

    def attempt(self, name: str, job: Callable[[], object], needs: float = 0.0) -> bool:
        """Run a job if there is time; record its error, or that it was skipped. Return whether it finished.

        Args:
            name: its name in the notes.
            job: writes its own notes.
            needs: expected duration in seconds.
        """
        if self.left < needs or self.left <= 0:
            self.note("skipped", name=name, needs=round(needs, 1), left=round(self.left, 1))
            return False
        began = time.monotonic()
        try:
            job()
        except Exception as error:  # the failure of one part must not stop the others
            text = traceback.format_exc(limit=-6)
            self.note("error", name=name, error=f"{type(error).__name__}: {error}"[:500], trace=text[-2500:])
            return False
        finally:
            free()
        self.note("took", name=name, seconds=round(time.monotonic() - began, 2))
        return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; an incomplete last line is ignored, a missing file is empty."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def dataset(visit: Visit) -> Dataset:
    """The data, complete or as far as available."""
    spec = DATASETS.get(visit.data)
    return load_available(visit.data) if spec is not None and spec.source[1] else load(visit.data)


def wait() -> None:
    """Wait for the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def free() -> None:
    """Release the allocator's unused memory."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def seconds_of(job: Callable[[], object], times: int, warm: int = 2) -> float:
    """Seconds of one call, the mean over ``times`` after ``warm`` calls, synchronised at both ends."""
    for _ in range(warm):
        job()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        job()
    wait()
    return (time.perf_counter() - began) / times


class Peak:
    """Peak memory of tensors on the accelerator inside a block; 0 on a CPU."""

    bytes = 0

    def __enter__(self) -> Peak:
        if torch.accelerator.is_available():
            wait()
            torch.accelerator.memory.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.accelerator.is_available():
            wait()
            self.bytes = torch.accelerator.memory.max_memory_allocated()

    @property
    def gib(self) -> float:
        """Peak in GiB, to three decimals."""
        return round(self.bytes / GIB, 3)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's precision of float32 products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_machine(visit: Visit, book: Notebook) -> None:
    """Record the machine, the rates of its matrix product by dtype, and the bandwidth of a copy."""
    device, size = torch.device(visit.device), visit.matrix
    book.note(
        "environment",
        **environment(device),
        cudnn=torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        convolutions_in_tf32=torch.backends.cudnn.allow_tf32,
        visit=visit.plain(),
        at=time.strftime("%Y-%m-%d"),
    )
    rates = {}
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with matmul_precision(precision):
            rates[name] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, 10, 3)  # type: ignore[misc]
        del a, b
    source = torch.randn(visit.copied // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 10, 3)
    book.note("peak", matmul_flops=rates, copy_bytes=bandwidth)


def peaks_of(book: Notebook) -> dict[str, float]:
    """The last rates recorded by :func:`measure_machine`; empty if it has not run."""
    found = [line["matmul_flops"] for line in book.lines() if line["kind"] == "peak"]
    return found[-1] if found else {}


def pace(book: Notebook, work: float, seconds: float) -> dict[str, Any]:
    """What a note says of counted operations: their number in 10^12, per second, and as a share of each peak."""
    rate = work / seconds
    shares = {kind: round(rate / reached, 4) for kind, reached in peaks_of(book).items()}
    return {"tflop": work / 1e12, "flops": rate, "share_of_peak": shares}
