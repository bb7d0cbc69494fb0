"""What a number was computed with: versions and device, the same for every run on one machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("gambeson", "torch", "torchvision", "accelerate", "safetensors", "numpy")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return the versions of what computes, and the name of the device."""
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
