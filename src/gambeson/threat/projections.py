"""Exact projections and steps for the intersection of a norm ball and a box, for independent rows (R, D)."""

from __future__ import annotations

import torch

TINY = 1e-12
_HALVINGS = 26
"""Enough to identify the values at a bound; the closed form for the others then gives the multiplier exactly, with less
work and less rounding than the running sums of a sort."""
_ROUNDS = 8
"""Twice as many as images and Gaussian steps were observed to need; a row that needs more ends inside the ball, just
short of its surface."""


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

    The nearest point is min(s |z_i|, room_i) for the largest s in [0, 1] that keeps its length at eps. Iterates from
    below: an s that is too small identifies values at their bound, and without them s is larger.
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
    # A scale slightly below one undoes the rounding of long sums.
    return found * (eps / length.clamp(min=TINY)).clamp(max=1)


def fill_greedily(gradient: torch.Tensor, room: torch.Tensor, length: torch.Tensor | float) -> torch.Tensor:
    """Return the step of 1-norm ``length`` that raises a linear function most inside the box.

    The value with the largest gradient is moved as far as it may go, then the next, until the length is spent
    (Croce and Hein 2021, proposition 3.2): without a box that is the largest value only.

    Args:
        gradient: (R, D).
        room: (R, D), not negative: how far each value may go in the direction of its gradient.
        length: a number, or (R, 1).
    """
    # A value without gradient is not moved.
    room = torch.where(gradient == 0, torch.zeros_like(room), room)
    order = gradient.abs().argsort(dim=1, descending=True, stable=True)
    rooms = room.gather(1, order)
    used = rooms.cumsum(1) - rooms
    moves = (length - used).clamp(min=0).minimum(rooms)
    return torch.zeros_like(moves).scatter(1, order, moves) * gradient.sign()


def largest_share(gradient: torch.Tensor, room: torch.Tensor, share: float) -> torch.Tensor:
    """Return equal moves along the largest ``share`` of each row's gradient, with a total 1-norm of 1.

    SLIDE (Tramer and Boneh 2019, section 4). Values that cannot move are skipped.
    """
    usable = torch.where(room > 0, gradient, torch.zeros_like(gradient))
    count = max(1, round(share * gradient.shape[1]))
    values, order = usable.abs().topk(count, dim=1)
    signs = usable.sign().gather(1, order) * (values > 0)
    moves = signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(gradient).scatter(1, order, moves)
