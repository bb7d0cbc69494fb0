"""Hidden layers of a model by name, and their activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, unknown_name
from gambeson.victim import Victim

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layer_names(model: nn.Module, *, at_most: int | None = None, convolutions: bool = False) -> list[str]:
    """Return the names of the convolutions and linear layers, in order of their registration.

    Args:
        model: any module.
        at_most: return this many, evenly spaced from the first to the last.
        convolutions: return only convolutions, if there are any.

    Raises:
        UserError: there are none.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    if convolutions:
        found = [name for name in found if not isinstance(model.get_submodule(name), nn.Linear)] or found
    if not found:
        raise UserError("the model has no convolution and no linear layer: name the layers in layers=(...)")
    if at_most is None or len(found) <= at_most:
        return found
    last = len(found) - 1
    return [found[round(k * last / max(1, at_most - 1))] for k in range(at_most)]


def activations(victim: Victim, images: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
    """Return the outputs of the named modules for ``images``, in the order of the names, with their graph.

    Computed on the model itself, not on a fast copy, whose modules may be folded. The empty name is the model.

    Raises:
        UserError: an unknown name, a layer that is not called, or one whose output is not a tensor.
    """
    modules = dict(victim.model.named_modules())
    kept: dict[str, Any] = {}
    handles = []
    for name in names:
        if name not in modules:
            raise unknown_name("layer", name, [known for known in modules if known])

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            kept[name] = output

        handles.append(modules[name].register_forward_hook(keep))
    try:
        victim.forward_original(images)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not isinstance(kept.get(name), torch.Tensor):
            came = "nothing" if name not in kept else f"a {type(kept[name]).__name__}"
            raise UserError(f"layer {name!r} returns {came}: choose a layer that returns a tensor")
    return [kept[name] for name in names]
