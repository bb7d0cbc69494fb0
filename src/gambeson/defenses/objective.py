"""A defence is an objective: a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gambeson.base import Config
from gambeson.defenses.terms import Batch, Term

Losses = dict[str, torch.Tensor]
"""The value of each term, detached, and their weighted sum as ``loss``, with its graph."""


class Defense(Config):
    """Base of every defence. A new one is a frozen configuration with :meth:`terms`."""

    def terms(self) -> Mapping[str, tuple[float, Term]]:
        """Return each term of the objective with its weight, by name."""
        raise NotImplementedError

    def check(self, batch_size: int) -> None:
        """Refuse a batch size that the objective cannot work with, before the training starts."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; a term of weight zero costs nothing and is left out."""
        values = {name: (weight, term(model, batch)) for name, (weight, term) in self.terms().items() if weight}
        total = torch.stack([weight * value for weight, value in values.values()]).sum()
        return {"loss": total} | {name: value.detach() for name, (_, value) in values.items()}
