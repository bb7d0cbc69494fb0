"""Exact projections and steps where a norm ball meets the box: rows (R, D), each alone."""

from __future__ import annotations

import torch

TINY = 1e-12
_HALVINGS = 26
"""Enough to tell which values stand at a bound; the formula for the others then gives the multiplier exactly, at
less cost and with less rounding than the running sums of a sort."""
_ROUNDS = 8
"""Twice what images and Gaussian steps were seen to need; a row that needs more stays inside the ball, just short
of its surface."""


def project_l1_box(rows: torch.Tensor, room: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """Return the nearest point of {|d|_1 <= eps, |d_i| <= room_i} to each row, signs kept.

    The nearest point is min((|z_i| - t)+, room_i) for the one t >= 0 that makes its sum eps (Duchi et al. 2008,
    section 4, for room = |z|; Croce and Hein 2021, section 3.1, with the box).

    Args:
        rows: (R, D).
        room: (R, D), not negative: how far each value may go in the direction of its sign.
        eps: radius; a number, or (R, 1).
    """
    size = rows.abs()
    low, high = torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        long = (size - middle).clamp_(min=0).minimum(room).sum(1, keepdim=True) > eps
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    left = size - (low + high) / 2
    held, free = left >= room, (left > 0) & (left < room)
    surplus = size.masked_fill(~free, 0).sum(1, keepdim=True) + room.masked_fill(~held, 0).sum(1, keepdim=True) - eps
    shift = (surplus / free.sum(1, keepdim=True).clamp(min=1)).maximum(low).minimum(high)
    found = (size - shift * (size.minimum(room).sum(1, keepdim=True) > eps)).clamp(min=0).minimum(room)
    return _within(found, found.sum(1, keepdim=True), eps) * rows.sign()


def project_l2_box(rows: torch.Tensor, room: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """Return the nearest point of {|d|_2 <= eps, |d_i| <= room_i} to each row, signs kept.

    The nearest point is min(s |z_i|, room_i) for the largest s in [0, 1] that keeps its length at eps. A first s
    that is too small shows values that stand at their room; without them s is larger, and so on from below.
    """
    size = rows.abs()
    squares, limits = size.square(), room.square()
    whole = size.minimum(room).square().sum(1, keepdim=True) <= eps**2
    share = (eps / squares.sum(1, keepdim=True).sqrt().clamp(min=TINY)).clamp(max=1)
    for _ in range(_ROUNDS):
        held = size * share >= room
        left = (eps**2 - limits.masked_fill(~held, 0).sum(1, keepdim=True)).clamp(min=0)
        free = squares.masked_fill(held, 0).sum(1, keepdim=True)
        share = (left / free.clamp(min=TINY)).sqrt().clamp(max=1).maximum(share)
    found = torch.where(whole, size, size * share).minimum(room)
    return _within(found, found.square().sum(1, keepdim=True).sqrt(), eps) * rows.sign()


def _within(found: torch.Tensor, length: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    # The rounding of long sums is taken back by a scale a hair below one.
    return found * (eps / length.clamp(min=TINY)).clamp(max=1)


def fill_greedily(gradient: torch.Tensor, room: torch.Tensor, length: torch.Tensor | float) -> torch.Tensor:
    """Return the step of 1-norm ``length`` that raises a linear function most inside the box.

    The value with the largest gradient is moved as far as it may go, then the next, until the length is used up
    (Croce and Hein 2021, proposition 3.2): without a box that is the one largest value.

    Args:
        gradient: (R, D).
        room: (R, D), not negative: how far each value may go in the direction of its gradient.
        length: a number, or (R, 1).
    """
    # A value without gradient is left alone, whatever its room.
    room = torch.where(gradient == 0, torch.zeros_like(room), room)
    order = gradient.abs().argsort(dim=1, descending=True, stable=True)
    rooms = room.gather(1, order)
    used = rooms.cumsum(1) - rooms
    moves = (length - used).clamp(min=0).minimum(rooms)
    return torch.zeros_like(moves).scatter(1, order, moves) * gradient.sign()


def largest_share(gradient: torch.Tensor, room: torch.Tensor, share: float) -> torch.Tensor:
    """Return equal moves along the largest ``share`` of each row's gradient, of 1-norm 1 in all.

    SLIDE (Tramer and Boneh 2019, section 4). Values that have no room are passed over.
    """
    usable = torch.where(room > 0, gradient, torch.zeros_like(gradient))
    count = max(1, round(share * gradient.shape[1]))
    values, order = usable.abs().topk(count, dim=1)
    signs = usable.sign().gather(1, order) * (values > 0)
    moves = signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(gradient).scatter(1, order, moves)
