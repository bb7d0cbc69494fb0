"""The frozen, counted view of a model through which every attack looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn

from gambeson.base import UserError


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in evaluation mode without parameter gradients; put back every sub-module as it was.

    Modes and flags are read on entry, for each sub-module and parameter alone, and restored after an
    exception too: a BatchNorm that the user had frozen stays frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Victim:
    """A model under attack. Use it as a context manager; inside, it is frozen (see :func:`frozen`).

    Attributes:
        forwards: images sent forward so far.
        backwards: images whose gradient was taken so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self.backwards = 0
        self._guard = frozen(model)
        self._seen_input = False

    def __enter__(self) -> Victim:
        self._guard = frozen(self.model)
        self._guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.__exit__(kind, error, trace)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU for a model without any."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of pixels (N, C, H, W) in [0, 1]."""
        if not self._seen_input:
            self._check_input(images)
            self._seen_input = True
        self.forwards += len(images)
        output = self.model(images)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor):
            raise UserError(
                f"the model returned {type(output).__name__}: expected a tensor of logits or an object with `.logits`; "
                "wrap the model so that it returns the logits alone"
            )
        return logits

    def gradient(self, value: torch.Tensor, wrt: torch.Tensor, images: int) -> torch.Tensor:
        """Return the gradient of a scalar with respect to ``wrt``, counted as ``images`` backward passes."""
        self.backwards += images
        (gradient,) = torch.autograd.grad(value, wrt)
        return gradient

    def _check_input(self, images: torch.Tensor) -> None:
        if any(True for _ in self.model.parameters()) and self.device != images.device:
            raise UserError(
                f"the model is on {self.device} and the images on {images.device}: move one of them to the other"
            )
        first = next((module for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None and first.in_channels != images.shape[1]:
            raise UserError(
                f"the images have {images.shape[1]} channels, but the model takes {first.in_channels}: "
                "choose data and model that fit each other"
            )
