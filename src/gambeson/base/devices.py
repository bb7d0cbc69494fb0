"""Which device to compute on."""

from __future__ import annotations

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
