"""Logits of a model that returns something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError

PROBABILITIES = "probabilities"
_TINY = 1e-30


class as_logits(nn.Module):  # noqa: N801  (used like a function)
    """Wrap a model so that it returns logits.

    Args:
        model: any module.
        output: ``probabilities``, whose logarithm is then returned (softmax of it gives them back); or the key under
            which a mapping has the logits.

    Raises:
        UserError: from ``forward``, for an output that is neither.
    """

    def __init__(self, model: nn.Module, output: str = PROBABILITIES) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of images (N, C, H, W)."""
        answer: Any = self.model(images)
        if self.output == PROBABILITIES:
            if isinstance(answer, torch.Tensor):
                return answer.clamp(min=_TINY).log()
        elif isinstance(answer, Mapping) and isinstance(answer.get(self.output), torch.Tensor):
            return answer[self.output]
        keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise UserError(
            f"the model returned {type(answer).__name__}{keys}, and {self.output!r} was to be read from it: name "
            "`probabilities` for a tensor of them, or the key of the logits"
        )
