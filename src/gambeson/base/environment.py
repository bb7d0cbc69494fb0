"""Versions, devices, precision and processes: what a number was computed with."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gambeson.base.errors import UserError

_PACKAGES = ("gambeson", "torch", "torchvision", "accelerate", "safetensors", "numpy")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return package versions and the device's name; the same for every run on one machine."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    kind = torch.device(device)
    if kind.type == "cuda":
        name = torch.cuda.get_device_name(kind)
    else:
        name = f"{platform.machine()} {kind.type}, {torch.get_num_threads()} threads"
    return found | {"device": name}


def pick_device(name: str = "auto") -> str:
    """Return the device's name; ``auto`` is the machine's accelerator if it has one.

    Raises:
        UserError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return "cpu" if accelerator is None else accelerator.type
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError):
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UserError(f"device {name!r} is not available here: choose one of {here}") from None
    return name


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in full float32 inside the block: no autocast, and no TF32, torch's default for convolutions.

    Args:
        device: the device that computes.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@contextmanager
def default_dtype(kind: torch.dtype = torch.float32) -> Iterator[None]:
    """Create tensors as ``kind`` inside the block: no draw or constant then depends on the caller's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Choose kernels with second derivatives inside the block: fused attention and cuDNN's recurrent nets have none."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    enabled = torch.backends.cudnn.enabled and not recurrent
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=enabled):
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """Use deterministic cuDNN convolutions inside the block."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def place() -> tuple[int, int]:
    """Return the rank of this process and the world size: (0, 1) outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """End the process group, if there is one, as every process of a distributed run should before it exits.

    A process that exits with its group running may abort, because the group's threads outlive what they use.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Replace float tensors, in place, by their mean over all processes; one message per dtype and device."""
    _together(tensors, lambda flat: dist.all_reduce(flat), 1 / place()[1])


def total(counts: Iterable[int], device: torch.device) -> list[int]:
    """Return the sums of integers over all processes, which communicate on ``device``."""
    counts = list(counts)
    if place()[1] == 1:
        return counts
    sums = torch.tensor(counts, device=device)
    dist.all_reduce(sums)
    return [int(value) for value in sums]


def share_first(tensors: Iterable[torch.Tensor]) -> None:
    """Broadcast the tensors of the first process to all others, in place."""
    _together(tensors, lambda flat: dist.broadcast(flat, 0), None)


def _together(tensors: Iterable[torch.Tensor], send: Callable[[torch.Tensor], object], factor: float | None) -> None:
    if place()[1] == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for several in kinds.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in several])
        send(flat)
        if factor is not None:
            flat.mul_(factor)
        for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))
