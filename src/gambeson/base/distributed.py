"""Collective operations over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def place() -> tuple[int, int]:
    """Return the rank of this process and the world size: (0, 1) outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


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
