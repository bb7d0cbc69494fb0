"""Controls: patterns that know nothing of the model. A universal perturbation has to beat them to count."""

from __future__ import annotations

import torch

from gambeson.base import generator, unknown_name
from gambeson.threat import Ball

CONTROLS = {"random-sign": 10, "chessboard": 1}
"""The controls beside every audit, and the number of draws that is customary: the chessboard is one fixed pattern."""
MORE_CONTROLS = {"uniform": 10}
"""Weaker ones, on request: uniform noise in the ball harms less than random signs on its surface."""


def control(name: str, ball: Ball, shape: tuple[int, ...], *, draws: int = 1, seed: int = 0) -> torch.Tensor:
    """Return ``draws`` patterns for images of ``shape`` (C, H, W), shape (draws, C, H, W), inside the ball.

    ``random-sign`` is +-eps at every value, independently. ``chessboard`` alternates +-eps with a period of two
    pixels, equal in all channels, -eps at the top left. Both have norm eps. ``uniform`` is drawn uniformly from the
    ball.

    Raises:
        UserError: no such control.
    """
    if name == "random-sign":
        return ball.signs((draws, *shape), generator(seed, "control", name))
    if name == "uniform":
        return ball.uniform((draws, *shape), generator(seed, "control", name))
    if name == "chessboard":
        rows, columns = torch.arange(shape[1]).view(-1, 1), torch.arange(shape[2])
        board = ((rows + columns) % 2 * 2 - 1).float()
        return ball.fill(board.expand(draws, *shape))
    raise unknown_name("control", name, CONTROLS | MORE_CONTROLS)
