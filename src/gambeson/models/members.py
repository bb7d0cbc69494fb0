"""Ensembles of bodies whose logits or probabilities are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call

from gambeson.base import UserError

Average = Literal["probabilities", "logits"]
"""Quantity that is averaged over the members: their softmax (returned as its logarithm, valid logits), or their logits.
Co et al. 2022 do not say which; the default, probabilities, is ours."""


class Members(nn.Module):
    """A body that averages the outputs of several members on the same normalised images.

    Attributes:
        members: the bodies.
        average: how their outputs are averaged.
        fixed_size: whether they accept images of one size only.
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
        """Return the logits (M, N, K) of M consecutive parts of ``x`` (M * N rows), one part per member.

        One batched computation (``torch.vmap`` over stacked weights). Faster where a step consists of many small
        kernels, as on a GPU; on a CPU a grouped convolution is no faster than a loop. Running statistics are updated;
        modes are those of the first member, and random draws (dropout, noise) differ between members.

        Raises:
            UserError: the members have different architectures, or M does not divide the number of rows.
        """
        bodies = list(self.members)
        if len(x) % len(bodies):
            raise UserError(
                f"{len(x)} images cannot be split evenly over {len(bodies)} members: choose a multiple of it"
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
            with torch.no_grad():  # BatchNorm has updated the stacked statistics
                for number, body in enumerate(bodies):
                    for name, buffer in body.named_buffers():
                        buffer.copy_(stacked[name][number])
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vote, (N, K)."""
        return vote(self.each(x), self.average)


def vote(logits: torch.Tensor, average: Average) -> torch.Tensor:
    """Average (M, N, K, ...) logits over the members, pixel by pixel of label maps: (N, K, ...).

    Finite, and with the correct gradient at every margin.

    The logits of a single member are returned unchanged.
    """
    if len(logits) == 1:
        return logits[0]
    if average == "logits":
        return logits.mean(0)
    # Not the logarithm of a clamped mean, which loses the gradient where every member is confident.
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
