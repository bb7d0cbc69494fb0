"""Parameter counts, fingerprints and memory estimates of models."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn

from gambeson.base import UserError, seeded


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, each counted once; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def fingerprint(module: nn.Module) -> str:
    """Hash every parameter and buffer: names, types, shapes and bytes.

    Equal weights give equal fingerprints on every device; one changed bit gives another.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.flatten().clone(memory_format=torch.contiguous_format)  # one value may have the stride 0
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


SECOND_BACKWARD = 2.0
"""Activations kept by a differentiable gradient, as a multiple of a plain forward's: measured 1.6 for the
LeNets and 2.0 for ResNet-20, with one random projection."""


def training_bytes(
    model: nn.Module,
    images: torch.Tensor,
    *,
    batch_size: int,
    members: int = 1,
    at_once: int = 1,
    moments: int = 1,
    double_backward: bool = False,
) -> int:
    """Estimate the memory, in bytes, of training ``members`` copies of a model.

    Includes weights, gradients and optimiser moments of every member, and the activations that concurrent members keep
    for the backward pass; excludes images and the framework.

    Args:
        model: one member.
        images: (2 or more, C, H, W), on the model's device, to measure the activations per image.
        batch_size: images per step and member.
        members: M.
        at_once: members whose activations exist at the same time.
        moments: optimiser tensors per weight: 1 for momentum, 2 for Adam.
        double_backward: whether the objective differentiates a gradient.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    kept = _kept(model, images) / len(images) * batch_size * (SECOND_BACKWARD if double_backward else 1)
    return int(members * (weights * (2 + moments) + buffers) + min(members, at_once) * kept)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None if unknown."""
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
        except OSError:
            return None
    asked = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return None if asked is None else int(asked(device)[0])


def check_memory(needed: int, device: torch.device, members: int, *, free: int | None = None) -> None:
    """Raise if an ensemble does not fit in memory.

    Args:
        needed: bytes, from :func:`training_bytes`.
        device: of the training.
        members: how many.
        free: bytes; None asks the device.

    Raises:
        UserError: more members than memory allows.
    """
    free = free_bytes(device) if free is None else free
    if free is not None and needed > free:
        raise UserError(
            f"training {members} members needs about {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free on "
            f"{device}: choose fewer members or a smaller batch, compute them in a loop, or train them one by one"
        )


def _kept(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes kept by a forward pass for the backward pass, without the weights; the model is not changed."""
    view = copy.deepcopy(model).train()
    own = {value.untyped_storage().data_ptr() for value in [*view.parameters(), *view.buffers()]}
    seen: dict[int, int] = {}
    alive = []  # addresses are unique only among live tensors

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with seeded(0, "memory"), torch.enable_grad(), hooks:
        view(images.detach().clone().requires_grad_())
    return sum(seen.values())
