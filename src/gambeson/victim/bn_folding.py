"""Folding of BatchNorm into the preceding convolution, for any module: found by hooks, verified by comparing logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gambeson.base import full_precision, generator, seeded
from gambeson.victim.graphs import Graphs
from gambeson.victim.inspect import logits_of

TOLERANCE = 1e-4
"""Largest allowed difference between the logits of the copy and the model, as a share of the largest logit."""
GRADIENT_TOLERANCE = 1e-2
"""Largest allowed norm of the difference of their gradients, as a share of the gradient's: a kink may flip."""


class FoldedModel:
    """A frozen copy of a model with each BatchNorm folded into the convolution before it.

    Hooks in one forward of ``example`` find which convolution feeds which BatchNorm, so models need not be traceable.
    Folding is wrong if the output of a convolution is used elsewhere too; therefore the copy's logits and gradient are
    compared with the model's, and if they differ nothing is folded. A memory layout is proved in the same way.

    Args:
        model: in evaluation mode.
        example: (N, C, H, W) images.

    Attributes:
        view: the copy.
        pairs: names of the folded (convolution, BatchNorm) pairs.
        layout: its memory layout, and that of the images it takes.
        graphs: CUDA graphs that compute with the copy.

    Raises:
        ValueError: no copy gives the model's results.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.graphs = Graphs()
        self._places: tuple[int, ...] = ()
        self._versions = _versions(model)
        self.pairs = _pairs(model, example)
        self._kept = _attributes(model)  # no other may get the id of one
        self._signature = signature(model), checksum(self._kept)
        plain = copy.deepcopy(model).requires_grad_(False)
        self.view = plain if not self.pairs else copy.deepcopy(plain)
        self.layout = torch.contiguous_format
        self._proved = {self.layout: True}
        for conv_name, norm_name in self.pairs:
            conv, norm = self.view.get_submodule(conv_name), self.view.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            self.view.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            self.view.set_submodule(norm_name, nn.Identity())
        self.view.requires_grad_(False)
        if self._rectifies_in_place(model, example):
            return
        if self.pairs and not _agree(model, self.view, example):
            self.view, self.pairs = plain, []
        if not self.pairs and not _agree(model, plain, example):
            raise ValueError("the copy gives other results")

    def _rectifies_in_place(self, model: nn.Module, example: torch.Tensor) -> bool:
        """Let the copy's ReLUs write into their inputs, a tensor less each, if it has the model's results then too."""
        modules = list(self.view.modules())
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return False  # a hook may keep what would be written into
        relus = [module for module in modules if type(module) is nn.ReLU and not module.inplace]
        for relu in relus:
            relu.inplace = True
        try:
            agree = bool(relus) and _agree(model, self.view, example)
        except RuntimeError:  # the backward needs what was written into
            agree = False
        for relu in relus:
            relu.inplace = agree
        return agree

    def lay_out(self, model: nn.Module, example: torch.Tensor, layout: torch.memory_format) -> None:
        """Bring the copy into a memory layout if it gives the model's results there."""
        if layout not in self._proved:
            self.view.to(memory_format=layout)
            try:
                self._proved[layout] = _agree(model, self.view, example, layout)
            except RuntimeError:  # such as .view of what is no longer contiguous
                self._proved[layout] = False
        self.layout = layout if self._proved[layout] else torch.contiguous_format
        self.view.to(memory_format=self.layout)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still has the structure that the copy was made from; values may differ."""
        return (signature(model), checksum(_attributes(model))) == self._signature

    def keep_graphs(self) -> None:
        """Drop graphs that were captured with other tensors than the copy now has."""
        places = tuple(tensor.data_ptr() for tensor in self.view.state_dict().values())
        if places != self._places:
            self.graphs.clear()
        self._places = places

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> bool:
        """Update the copy to the model's current weights and statistics, in place, and return whether they changed.

        Uses ``.data``, invisible to autograd: another victim of the same model may have a graph on this copy, and finds
        the same values there.
        """
        folded = {name for pair in self.pairs for name in pair}
        values = dict(_tensors(model))
        before, self._versions = self._versions, _versions(model)
        changed = before != self._versions
        for name, tensor in _tensors(self.view):
            if name.rpartition(".")[0] not in folded:
                tensor.data.copy_(values[name])
        if not self.pairs:
            return changed
        # As torch.nn.utils.fusion computes it, to the bit, with one kernel for the vectors of all layers.
        convs: list[Any] = [model.get_submodule(conv) for conv, _ in self.pairs]
        norms: list[Any] = [model.get_submodule(norm) for _, norm in self.pairs]
        targets: list[Any] = [self.view.get_submodule(conv) for conv, _ in self.pairs]
        scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
        torch._foreach_rsqrt_(scales)
        biases = torch._foreach_neg([norm.running_mean for norm in norms])
        for bias, conv in zip(biases, convs, strict=True):
            if conv.bias is not None:
                bias.add_(conv.bias)
        torch._foreach_mul_(biases, scales)
        affine = [k for k, norm in enumerate(norms) if norm.affine]
        for products in (scales, biases):
            torch._foreach_mul_([products[k] for k in affine], [norms[k].weight for k in affine])
        torch._foreach_add_([biases[k] for k in affine], [norms[k].bias for k in affine])
        for conv, scale, target in zip(convs, scales, targets, strict=True):
            torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=target.weight.data)
        torch._foreach_copy_([target.bias.data for target in targets], biases)
        return changed


_made: WeakKeyDictionary[nn.Module, FoldedModel] = WeakKeyDictionary()


def fold_batchnorms(
    model: nn.Module,
    example: torch.Tensor,
    layout: torch.memory_format = torch.contiguous_format,
    *,
    trained: bool = False,
) -> FoldedModel:
    """Return a folded copy of ``model``, reusing and updating an earlier one if it still fits.

    Args:
        model: in evaluation mode.
        example: (N, C, H, W) images.
        layout: memory layout of the copy if it works there, else contiguous.
        trained: whether the model is being trained: where its weights have changed, as between two steps, an earlier
            copy is not compared with it again, which would cost a forward of each in every step.

    Raises:
        ValueError: no copy gives the model's results.
    """
    made = _made.get(model)
    if made is None or not made.fits(model) or next(made.view.parameters(), example).device != example.device:
        made = _made[model] = FoldedModel(model, example)
        made.lay_out(model, example, layout)
        return made
    changed = made.refresh(model)
    made.lay_out(model, example, layout)
    # What a model does may also depend on an object that it holds, or on a global.
    if not (trained and changed) and not _agree(model, made.view, example, made.layout, gradients=False):
        del _made[model]
        return fold_batchnorms(model, example, layout)
    return made


def _agree(
    model: nn.Module,
    view: nn.Module,
    example: torch.Tensor,
    layout: torch.memory_format = torch.contiguous_format,
    *,
    gradients: bool = True,
) -> bool:
    """Whether a copy has the model's logits and input gradient, up to rounding, on images of a memory layout.

    Nor may it write into its input where the model does not. Without ``gradients``, only the logits of ``example`` are
    compared, which takes a forward of each.

    The gradient is compared at random images, where no rounding decides which side of a kink they are on. Where the
    model draws random numbers, whose order the layout may change, its results have to exist only.
    """

    def results(net: nn.Module, images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        sent = images.clone()
        with seeded(seed, "proof"):  # the same noise for both
            logits = logits_of(net(sent), len(images))
        if not logits.requires_grad:
            return logits.detach(), None, sent._version > 0
        weights = torch.linspace(1, 2, logits[0].numel(), device=logits.device).view(logits.shape[1:]).to(logits.dtype)
        # Of a sum, since torch imports sympy, which takes a second, to look at a cotangent.
        (gradient,) = torch.autograd.grad((logits * weights).sum(), images, allow_unused=True)
        return logits.detach(), gradient, sent._version > 0

    def near(ours: torch.Tensor, theirs: torch.Tensor, most: float) -> bool:
        # One wait for the device.
        return ours.shape == theirs.shape and bool(
            (ours - theirs).abs().max() <= most * theirs.abs().max().clamp(min=1)
        )

    draw = generator(0, "proof")
    noise = torch.rand(example.shape, generator=draw).to(example)
    rounding = 8 * torch.finfo(example.dtype).eps  # matters in half precision
    tried = (example, (example + noise) / 2) if gradients else (example,)
    with (
        torch.set_grad_enabled(gradients),
        full_precision(example.device),
    ):  # TF32 or autocast would fail the comparison
        for images in tried:
            plain, laid = images.clone().requires_grad_(), images.clone(memory_format=layout).requires_grad_()
            logits, gradient, writes = results(model, plain, 0)
            found, found_gradient, found_writes = results(view, laid, 0)
            if found_writes and not writes:
                return False
            if not near(found, logits, max(TOLERANCE, rounding)):
                drawn = layout != torch.contiguous_format and not torch.equal(logits, results(model, plain, 1)[0])
                return drawn and bool(found.isfinite().all()) and (found_gradient is None) == (gradient is None)
        if found_gradient is None or gradient is None:
            return found_gradient is gradient
        return float((found_gradient - gradient).norm()) <= max(GRADIENT_TOLERANCE, rounding) * float(gradient.norm())


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, also those that are not saved."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _versions(model: nn.Module) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for _, tensor in _tensors(model)]


def _attributes(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that are plain attributes of modules, which no copy of parameters and buffers brings along."""
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, torch.Tensor)]


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> Hashable:
    """The norm of every tensor of floats: it tells a change through ``.data``, of which ``_version`` knows nothing."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.layout == torch.strided]
    norms = torch._foreach_norm(floats) if floats else ()
    return tuple(float(norm) for norm in torch.stack([norm.double().cpu() for norm in norms])) if norms else ()


def signature(model: nn.Module) -> Hashable:
    """The structure of a model, without values of parameters and buffers and modes: its modules and their settings."""
    return tuple((name, type(module), _settings(module), _shapes(module)) for name, module in model.named_modules())


_PLAIN = (bool, int, float, str, type(None))
_HOOKS = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
_OTHERWISE = set(vars(nn.Module())) - _HOOKS


def _settings(module: nn.Module) -> tuple[Hashable, ...]:
    return tuple((key, _state(value)) for key, value in vars(module).items() if key not in _OTHERWISE)


def _state(value: object) -> Hashable:
    """What tells a change of a module's attribute: its value if it is plain, else which object it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, nn.Module):  # in a list, which does not register it
        return id(value), tuple(_state(tensor) for _, tensor in _tensors(value))
    if isinstance(value, list | tuple | set):
        return type(value), tuple(map(_state, value))
    if isinstance(value, dict):
        return type(value), tuple((id(key), _state(one)) for key, one in value.items())
    return id(value)


def _shapes(module: nn.Module) -> tuple[Hashable, ...]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return tuple((name, value.shape, value.dtype, value.device) for name, value in tensors if value is not None)


def _pairs(model: nn.Module, example: torch.Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) pairs in which one's output is the other's input, and each is called once."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, nn.Module] = {}
    calls: dict[nn.Module, int] = {}
    keep: list[torch.Tensor] = []  # ids are unique only among live tensors
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
            model(example.clone())  # which it may write into
    finally:
        for remove in hooks:
            remove()
    convs = [conv for conv, _ in found]
    return [
        (names[conv], names[norm]) for conv, norm in found if calls[conv] == calls[norm] == 1 and convs.count(conv) == 1
    ]
