"""BatchNorm folded into the convolution before it, for any module: found by watching, trusted only after a proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gambeson.base import seeded
from gambeson.victim.outputs import logits_of

TOLERANCE = 1e-4
"""A folded copy whose logits are further than this share of the largest logit from the model's is thrown away."""


def folded(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, int]:
    """Return a frozen copy of ``model`` with each BatchNorm folded into the convolution whose output it takes.

    Which convolution feeds which BatchNorm is watched in one forward of ``example``, so that no model has to be
    traceable. A convolution whose output has another use as well would go wrong; the copy's logits on ``example``
    are therefore compared with the model's, and where they differ the copy is left unfolded.

    Args:
        model: in evaluation mode.
        example: (N, C, H, W) images.

    Returns:
        The copy, and how many pairs were folded in it.
    """
    pairs = _pairs(model, example)
    plain = copy.deepcopy(model).requires_grad_(False)
    if not pairs:
        return plain, 0
    view = copy.deepcopy(plain)
    for conv_name, norm_name in pairs:
        conv, norm = view.get_submodule(conv_name), view.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        view.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        view.set_submodule(norm_name, nn.Identity())
    view.requires_grad_(False)
    with torch.no_grad(), seeded(0, "proof"):
        expected = logits_of(model(example))
    with torch.no_grad(), seeded(0, "proof"):  # a model that draws noise draws the same again
        found = logits_of(view(example))
    close = float((expected - found).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))
    return (view, len(pairs)) if close else (plain, 0)


def _pairs(model: nn.Module, example: torch.Tensor) -> list[tuple[str, str]]:
    """Names of every (convolution, BatchNorm) where the one's output was the other's input, each called once."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, nn.Module] = {}
    calls: dict[nn.Module, int] = {}
    keep: list[torch.Tensor] = []  # an id is only unique among tensors that are alive
    found: list[tuple[nn.Module, nn.Module]] = []

    def after_conv(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        made[id(output)] = module
        keep.append(output)

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in made:
            found.append((made[id(inputs[0])], module))

    hooks: list[Callable[[], None]] = []
    for module in model.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after_conv).remove)
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm).remove)
    try:
        with torch.no_grad():
            model(example)
    finally:
        for remove in hooks:
            remove()
    convs = [conv for conv, _ in found]
    return [
        (names[conv], names[norm]) for conv, norm in found if calls[conv] == calls[norm] == 1 and convs.count(conv) == 1
    ]
