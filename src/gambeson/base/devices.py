"""Which device to compute on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gambeson.base.errors import UserError


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
        raise UserError(f"device {name!r} is not to be had here: choose one of {here}") from None
    return name


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper inside the block: no autocast, and no TF32, whose ten bits torch's convolutions take.

    Args:
        device: where it is computed.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@contextmanager
def repeatable() -> Iterator[None]:
    """Take only those convolutions of the accelerator's library that give the same bytes again, inside the block."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
