"""BatchNorm folded into the convolution before it, for any module: found by watching, trusted only after a proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from gambeson.base import full_precision, seeded
from gambeson.victim.inspect import logits_of

TOLERANCE = 1e-4
"""A folded copy whose logits are further than this share of the largest logit from the model's is thrown away."""


class FoldedModel:
    """A frozen copy of a model with each BatchNorm folded into the convolution whose output it takes.

    Which convolution feeds which BatchNorm is watched in one forward of ``example``, so that no model has to be
    traceable. A convolution whose output has another use as well would go wrong; the copy's logits on ``example``
    are therefore compared with the model's, and where they differ the copy is left unfolded.

    Args:
        model: in evaluation mode.
        example: (N, C, H, W) images.

    Attributes:
        view: the copy.
        pairs: the names of every (convolution, BatchNorm) folded in it.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.pairs = _pairs(model, example)
        self._signature = _signature(model)
        plain = copy.deepcopy(model).requires_grad_(False)
        self.view = plain
        if not self.pairs:
            return
        self.view = copy.deepcopy(plain)
        for conv_name, norm_name in self.pairs:
            conv, norm = self.view.get_submodule(conv_name), self.view.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            self.view.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            self.view.set_submodule(norm_name, nn.Identity())
        self.view.requires_grad_(False)
        with (
            torch.no_grad(),
            full_precision(example.device),
        ):  # what TF32 or autocast rounds off is no proof of anything
            with seeded(0, "proof"):
                expected = logits_of(model(example))
            with seeded(0, "proof"):  # a model that draws noise draws the same again
                found = logits_of(self.view(example))
        if float((expected - found).abs().max()) > TOLERANCE * max(1.0, float(expected.abs().max())):
            self.view, self.pairs = plain, []

    def fits(self, model: nn.Module) -> bool:
        """Whether the model is, but for the values of its tensors, what the copy was made of."""
        return _signature(model) == self._signature

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Bring the copy to the model's present weights and statistics, in place.

        Unseen by autograd (``.data``): another victim of the same model may have a graph on this very copy, and finds
        the same values there.
        """
        norms = {conv: model.get_submodule(norm) for conv, norm in self.pairs}
        folded = {name for pair in self.pairs for name in pair}
        values = dict(model.state_dict(keep_vars=True))
        for name, target in self.view.state_dict(keep_vars=True).items():
            if name.rpartition(".")[0] not in folded:
                target.data.copy_(values[name])
        for name, norm in norms.items():
            conv, target = model.get_submodule(name), self.view.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(target, nn.Conv2d)
            assert target.bias is not None
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            target.weight.data.copy_(weight)
            target.bias.data.copy_(bias)


_made: WeakKeyDictionary[nn.Module, FoldedModel] = WeakKeyDictionary()


def fold_batchnorms(model: nn.Module, example: torch.Tensor) -> FoldedModel:
    """Return a folded copy of ``model``: the one made before, brought to the present weights, where it still fits."""
    made = _made.get(model)
    if made is not None and made.fits(model) and next(made.view.parameters(), example).device == example.device:
        made.refresh(model)
        return made
    _made[model] = FoldedModel(model, example)
    return _made[model]


def _signature(model: nn.Module) -> Hashable:
    """Everything about a model that is neither a tensor's values nor a mode: its modules and their plain settings."""
    return tuple(
        (name, type(module), tuple(sorted(_settings(module).items())), _shapes(module))
        for name, module in model.named_modules()
    )


def _settings(module: nn.Module) -> dict[str, str]:
    plain = (bool, int, float, str, tuple, type(None))
    hooks = {"_forward_hooks", "_forward_pre_hooks"}
    found = {key: repr(value) for key, value in vars(module).items() if isinstance(value, plain) and key != "training"}
    return found | {key: str(sorted(map(id, vars(module)[key].values()))) for key in hooks}


def _shapes(module: nn.Module) -> tuple[Hashable, ...]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple((name, tuple(value.shape), value.dtype, value.device) for name, value in tensors)


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
