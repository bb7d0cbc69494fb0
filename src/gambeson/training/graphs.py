"""The training's own forward and backward as CUDA graphs: one launch each in place of hundreds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as unchanged_versions
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gambeson.victim import signature
from gambeson.victim.graphs import EAGER, NotRepeatableError, ambient, draws, no_waits, undone_on_error
from gambeson.victim.inspect import logits_of

MOST = 8
"""Graphs per training; each keeps the activations of its batch. What comes later is computed kernel by kernel."""
TOLERANCE = {False: 1e-3, True: 2e-2}
"""Largest relative difference between logits and gradients of a graph and of the calls it replaces, by autocast."""


class GraphedForward:
    """Computes a model's logits, for a loss whose backward follows, by graphs of fixed shapes.

    A graph is captured at the third call with the same model, weights and shapes, and compared with the calls it
    replaces before it is used. Calls before one backward have a graph each, for a replay overwrites what the backward
    needs. Models that draw random numbers, wait for the device or change their settings are computed as before.

    Attributes:
        refused: why nothing is captured any more, or None.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._seen: Counter[Hashable] = Counter()
        self._open: Counter[Hashable] = Counter()
        self._made: dict[Hashable, Callable[[torch.Tensor], Any]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __call__(self, model: nn.Module, images: torch.Tensor) -> Any:
        """Return ``model(images)``, with a graph to the weights, and to the images if they require a gradient.

        It can be differentiated once.
        """
        plain = torch.is_grad_enabled() and _get_current_dispatch_mode() is None
        # Parameters of a functional call are tensors that the next call replaces.
        own = all(isinstance(weight, nn.Parameter) for weight in model.parameters())
        if self.refused is not None or not plain or not own:
            return model(images)
        weights = tuple((id(weight), weight.requires_grad) for weight in model.parameters())
        modes = tuple(module.training for module in model.modules())
        form = images.shape, images.stride(), images.dtype, images.requires_grad
        calls = model, weights, modes, form, ambient()
        key = (*calls, self._open[calls])
        self._open[calls] += 1
        if key not in self._made:
            self._seen[key] += 1
            if self._seen[key] <= EAGER or len(self._made) >= MOST:
                return model(images)
            try:
                self._made[key] = _captured(model, images)
            except Exception as error:  # whatever cannot be captured is computed kernel by kernel
                self.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                if not isinstance(error, NotRepeatableError):
                    warnings.warn(f"the training's steps have no CUDA graph ({self.refused})", stacklevel=2)
                return model(images)
        return self._made[key](images)

    def close(self) -> None:
        """Note that the backward of all calls so far is done, so that their graphs can be replayed."""
        self._open.clear()


class _Whole(nn.Module):
    """A model without hooks of its own, whose forward can be replaced without changing the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images)


def _captured(model: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """Return the graphed model, after a comparison with the model; its buffers are as before.

    Raises:
        NotRepeatableError: the model draws random numbers, changes its settings or waits for the device, or the graph
            computes something else.
    """
    kind, buffers = images.device.type, [buffer.clone() for buffer in model.buffers()]
    sample = images.detach().clone().requires_grad_(images.requires_grad)
    lower = torch.is_autocast_enabled(kind)
    pool = torch.cuda.graph_pool_handle()
    try:
        before = draws(), signature(model)
        with no_waits():
            expected = _outcome(model, images)
        if (draws(), signature(model)) != before:
            raise NotRepeatableError("the model draws random numbers or changes its settings")
        quick = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=lower, cache_enabled=False)
        with undone_on_error(torch.cuda.current_stream(), pool), quick:
            graphed: Callable[[torch.Tensor], Any] = torch.cuda.make_graphed_callables(
                _Whole(model), (sample,), pool=pool, allow_unused_input=True, capture_error_mode="thread_local"
            )
        found = _outcome(graphed, images)
    finally:
        # An earlier forward of this step may have saved a buffer for its backward, which is now as it saw it.
        held = tuple(model.buffers())
        with torch.no_grad(), unchanged_versions(held):
            for buffer, value in zip(held, buffers, strict=True):
                buffer.copy_(value)
    for one, other in zip(found, expected, strict=True):
        if bool((one - other).norm() > TOLERANCE[lower] * other.norm()):
            raise RuntimeError("its numbers differ from those of the model")
    return graphed


def _outcome(model: Callable[[torch.Tensor], Any], images: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of a function of them with respect to weights and images that require one."""
    modules = model.parameters() if isinstance(model, nn.Module) else ()
    leaves = [weight for weight in modules if weight.requires_grad]
    point = images.detach().requires_grad_(images.requires_grad)
    logits = logits_of(model(point)).float()
    inputs = [*leaves, point] if images.requires_grad else leaves
    found = torch.autograd.grad(logits.logsumexp(1).sum(), inputs, allow_unused=True)
    return [logits.detach(), *(gradient.float() for gradient in found if gradient is not None)]
