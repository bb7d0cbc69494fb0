"""Several bodies that vote: the ensemble of Jacobian Ensembles and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Average = Literal["probabilities", "logits"]
"""What the members' votes are averaged as: their softmax (given back as its logarithm, itself valid logits), or their
logits. Co et al. 2022 do not say which; probabilities are our default."""


class Members(nn.Module):
    """A body that averages the answers of several, each of which sees the same normalised images.

    Attributes:
        members: the bodies.
        average: how they vote.
        fixed_size: whether they take images of one size only.
    """

    def __init__(self, members: Sequence[nn.Module], average: Average = "probabilities") -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.average: Average = average
        self.fixed_size = any(getattr(member, "fixed_size", False) for member in members)

    def each(self, x: torch.Tensor) -> torch.Tensor:
        """Return every member's logits, (M, N, K)."""
        return torch.stack([member(x) for member in self.members])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vote, (N, K)."""
        return vote(self.each(x), self.average)


def vote(logits: torch.Tensor, average: Average) -> torch.Tensor:
    """Average (M, N, K) logits over the members: (N, K), finite and with a right gradient at every margin.

    One member's logits are given back as they are.
    """
    if len(logits) == 1:
        return logits[0]
    if average == "logits":
        return logits.mean(0)
    # Not the logarithm of a clamped mean: that loses the gradient where every member is sure.
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
