"""Whether the members of an ensemble share their slopes: what averaging them can gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gambeson.analysis.jacobian import batch_jacobian, frobenius
from gambeson.analysis.stacked import stacked_spectrum
from gambeson.analysis.views import Source, opened
from gambeson.base import Config, UserError
from gambeson.victim import Victim


class MeanLogits(nn.Module):
    """Several victims as one model whose logits are the mean of theirs; each is charged for its own passes."""

    def __init__(self, members: Sequence[Victim]) -> None:
        super().__init__()
        self.models = nn.ModuleList(member.model for member in members)
        self._members = tuple(members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean logits (N, K) of pixels (N, C, H, W)."""
        return torch.stack([member.exact(images) for member in self._members]).mean(0)


def diversity_gain(members: Sequence[Source], images: torch.Tensor) -> torch.Tensor:
    """Return D = ||mean_m J_m||_F^2 / mean_m ||J_m||_F^2 at every image, (N,), in [0, 1].

    Notes on Jacobian ensembles, section 3: 1 for copies, 1/M for M orthogonal Jacobians of equal size, below 1/M
    where members cancel. NaN where every member's Jacobian is zero. Cost an image: M forwards and M K backwards.

    Args:
        members: modules or victims of the same classes in the same order.
        images: (N, C, H, W) in [0, 1].

    Raises:
        UserError: no members, or answers of different shapes.
    """
    if len(members) == 0:
        raise UserError("the list of members is empty: give one model or more")
    mean, size = None, torch.zeros(len(images), device=images.device, dtype=torch.float64)
    for member in members:
        jacobian = batch_jacobian(member, images)
        if mean is not None and mean.shape != jacobian.shape:
            raise UserError(
                f"members answer with {mean.shape[1]} and {jacobian.shape[1]} logits: "
                "choose members of the same classes"
            )
        size += frobenius(jacobian).double().square() / len(members)
        mean = jacobian / len(members) if mean is None else mean.add_(jacobian, alpha=1 / len(members))
    assert mean is not None
    return frobenius(mean).double().square() / size


class UniversalAlignment(Config):
    """Whether members share the universal direction: sigma_1 of the mean's stack against the members' own."""

    joint: float
    """sigma_1(mean_m Jbar_m), the stack of the mean logits."""
    members: tuple[float, ...]
    """sigma_1(Jbar_m)."""
    ratio: float | None
    """``joint`` over the mean of ``members``, in [0, 1]; 1: one perturbation is best against all. None where every
    member is flat."""
    directions: tuple[tuple[float, ...], ...]
    """|cosine| between the top directions of each two members."""


def universal_alignment(members: Sequence[Source], data: Any, *, seed: int = 0) -> UniversalAlignment:
    """Measure the cross-member alignment of the universal direction (notes on Jacobian ensembles, section 3).

    Cost: twice that of a stacked spectrum for each member: alone, and within the mean.

    Args:
        members: modules or victims of the same classes in the same order.
        data: a split, a dataset (its test split) or a pair (images, labels).
        seed: of the Lanczos start.

    Raises:
        UserError: no members.
    """
    with _all_opened(members) as victims:
        found = [stacked_spectrum(victim, data, seed=seed) for victim in victims]
        with Victim(MeanLogits(victims)) as mean:
            joint = stacked_spectrum(mean, data, seed=seed)
        for victim in victims:
            victim.backwards += mean.backwards  # forwards are charged as they happen
    sigmas = tuple(float(spectrum.values[0].clamp(min=0)) ** 0.5 for spectrum in found)
    top = torch.stack([spectrum.directions[0].flatten() for spectrum in found])
    own = float(joint.values[0].clamp(min=0)) ** 0.5
    return UniversalAlignment(
        joint=own,
        members=sigmas,
        ratio=own / (sum(sigmas) / len(sigmas)) if any(sigmas) else None,
        directions=tuple(tuple(row) for row in (top @ top.T).abs().tolist()),
    )


@contextmanager
def _all_opened(members: Sequence[Source]) -> Iterator[list[Victim]]:
    if len(members) == 0:
        raise UserError("the list of members is empty: give one model or more")
    with ExitStack() as stack:
        yield [stack.enter_context(opened(member)) for member in members]
