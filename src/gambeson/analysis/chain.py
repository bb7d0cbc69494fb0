"""Networks as chains of affine layers, ReLU and max-pooling on flat values, for bounds that need the matrices."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from gambeson.base import UserError

MOST = 2**26
"""Entries of the largest matrix of a layer: 11,000 values from 6,000."""
_EXACT = 1e-8
_COLUMNS = 256
_SHORTCUT = "the model's layers are no chain, one of them has two sources: expected one after the other"


@dataclass(frozen=True)
class Affine:
    """``weight @ x + bias``."""

    weight: torch.Tensor
    """(M, N)."""
    bias: torch.Tensor
    """(M,)."""


@dataclass(frozen=True)
class ReLU:
    """``max(x, 0)``."""


@dataclass(frozen=True)
class MaxPool:
    """The largest value of every window."""

    windows: torch.Tensor
    """(M, K), which values are in each; one that sticks out of the image repeats some."""


Layer = Affine | ReLU | MaxPool


def chain_of(model: torch.nn.Module, images: torch.Tensor) -> list[Layer]:
    """Return a model as a chain of layers, in float64 on the CPU.

    What lies between two ReLUs or poolings is written as one matrix, whatever it consists of, once it has been found to
    be affine.

    Args:
        model: in evaluation mode.
        images: (1, C, H, W), an example.

    Raises:
        UserError: it cannot be traced, it is no such chain, or a layer is too large.
    """
    plain, example = copy.deepcopy(model).cpu().double().eval(), images.cpu().double()
    try:
        program = torch.export.export(plain, (example,)).module()
    except Exception as error:
        raise UserError(
            f"the model cannot be traced ({type(error).__name__}): expected a chain of affine layers, ReLU and "
            "max-pooling"
        ) from None
    assert isinstance(program, fx.GraphModule)
    layers: list[Layer] = []
    values: dict[fx.Node, Any] = {}
    start, part = None, list[fx.Node]()
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                start, values[node] = node, example
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(program)
            elif node.op == "call_function":
                make = _KINDS.get(str(node.target))
                values[node] = node.target(*_given(node.args, values), **node.kwargs)
                if make is None:
                    part.append(node)
                    continue
                layers += _affine(start, part, node.args[0], values)
                layers.append(make(values[node.args[0]], *node.args[1:]))
                start, part = node, []
            elif node.op == "output":
                (result,) = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                layers += _affine(start, part, result, values)
    return layers


def _given(args: Any, values: Mapping[fx.Node, Any]) -> Any:
    return fx.map_arg(args, values.__getitem__)


def _affine(start: Any, part: list[fx.Node], end: Any, values: Mapping[fx.Node, Any]) -> list[Layer]:
    """Return what a part of the graph computes from ``start`` to ``end``: nothing, or an affine layer."""
    if end is start:
        return []
    used = {start, *part}
    loose = [node for one in part for node in one.all_input_nodes if node not in used and node.op != "get_attr"]
    if end not in used or loose:
        raise UserError(_SHORTCUT)

    def run(x: torch.Tensor) -> torch.Tensor:
        now = dict(values) | {start: x}
        for node in part:
            now[node] = node.target(*_given(node.args, now), **node.kwargs)  # type: ignore[operator]
        found: torch.Tensor = now[end]
        return found

    origin = torch.zeros_like(values[start])
    bias, size = run(origin).flatten(), origin.numel()
    if size * len(bias) > MOST:
        raise UserError(f"a layer has {size:,} inputs and {len(bias):,} outputs: too many for bounds by matrices")
    many: Callable[[torch.Tensor], torch.Tensor] = torch.vmap(run, chunk_size=_COLUMNS)
    units = torch.eye(size, dtype=origin.dtype).view(size, *origin.shape)
    weight = (many(units).flatten(1) - bias).T.contiguous()
    tried = torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=origin.dtype)
    expected, found = tried @ weight.T + bias, many(tried.view(4, *origin.shape)).flatten(1)
    if float((expected - found).abs().max()) > _EXACT * (1 + float(found.abs().max())):
        names = sorted({str(node.target).removeprefix("aten.").removesuffix(".default") for node in part})
        raise UserError(
            f"the model has a part that is not affine (of {', '.join(names)}): expected affine layers, ReLU and "
            "max-pooling"
        )
    return [Affine(weight, bias)]


def _pool(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> MaxPool:
    if ceil_mode:
        raise UserError("the model has a max-pooling with ceil_mode, which has no bounds here: expected none")
    number = torch.arange(1, x.numel() + 1, dtype=torch.float64).view(x.shape)
    windows = F.unfold(number, *map(tuple, (kernel, dilation, padding, stride or kernel)))  # zero where it sticks out
    windows = windows.view(x.shape[1], -1, windows.shape[-1]).transpose(1, 2).flatten(0, 1).long() - 1
    return MaxPool(torch.where(windows < 0, windows.amax(1, keepdim=True), windows))


_KINDS: dict[str, Callable[..., Layer]] = {
    "aten.relu.default": lambda x: ReLU(),
    "aten.relu_.default": lambda x: ReLU(),
    "aten.max_pool2d.default": _pool,
}
