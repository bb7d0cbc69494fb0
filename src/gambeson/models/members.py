"""Several bodies that vote: the ensemble of Jacobian Ensembles and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call

from gambeson.base import UserError

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

    def parted(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, N, K) of M consecutive parts of ``x`` (M * N rows), each from its own member.

        One batched computation (``torch.vmap`` over stacked weights). It pays where a step is many small kernels, as
        on a GPU; on a CPU a grouped convolution is no faster than the members in turn. Running statistics are kept;
        the modes are those of the first member, and random draws (dropout, noise) differ between members.

        Raises:
            UserError: the members are not of one architecture, or the rows do not fall into M parts.
        """
        bodies = list(self.members)
        if len(x) % len(bodies):
            raise UserError(
                f"{len(x)} images do not fall into parts for {len(bodies)} members: choose a number that they divide"
            )
        states = [dict(body.named_parameters()) | dict(body.named_buffers()) for body in bodies]
        shapes = [{name: value.shape for name, value in state.items()} for state in states]
        if any(other != shapes[0] for other in shapes):
            raise UserError("members of different architectures cannot be stacked: compute them in a loop")
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}

        def answer(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = functional_call(bodies[0], state, (images,))
            return found

        logits = torch.vmap(answer, randomness="different")(stacked, x.unflatten(0, (len(bodies), -1)))
        if self.training:
            with torch.no_grad():  # BatchNorm has moved the stacked statistics
                for number, body in enumerate(bodies):
                    for name, buffer in body.named_buffers():
                        buffer.copy_(stacked[name][number])
        return logits

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
