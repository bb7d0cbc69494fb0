"""Checkpoints: the state of a training run in one file, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, load_tensors, refuse_other, save_tensors

_MODEL, _OPTIMIZER, _CARRIED = "model.", "optimizer.", "carried."


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, carried: nn.Module, about: dict[str, Any]
) -> None:
    """Write weights, optimiser tensors, the buffers of ``carried`` and the JSON-ready ``about``, atomically.

    Generator states are not needed: every draw is named by the seed and the step (see :mod:`gambeson.base.seeds`).
    """
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    tensors |= {_CARRIED + name: value for name, value in carried.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    save_tensors(path, tensors, {**about, "optimizer": scalars})


def read_state(path: Path, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a saved state and the document saved with it.

    Raises:
        UserError: it belongs to a training with other ``settings``.
    """
    tensors, about = load_tensors(path, "the state of a training run")
    refuse_other(path.parent.parent, about["settings"], settings)
    return tensors, about


def load_state(
    path: Path,
    state: tuple[dict[str, torch.Tensor], dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: nn.Module,
) -> None:
    """Restore what :func:`read_state` has read.

    Raises:
        UserError: the state belongs to another model.
    """
    tensors, about = state

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(part(_MODEL))
        carried.load_state_dict(part(_CARRIED))
    except RuntimeError as error:
        raise UserError(
            f"{path} is the state of another model ({str(error).splitlines()[-1].strip()}): choose another --out"
        ) from None
    moments: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in about["optimizer"].items()}
    for name, value in part(_OPTIMIZER).items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
