"""Controls: patterns that use no information about the model, which a crafted perturbation must beat.

A control is itself a universal perturbation: if it does more harm than the crafted one, it bounds the model's
robustness (:func:`gambeson.evaluation.strongest`).
"""

from __future__ import annotations

import torch

from gambeson.attacks.universal.procedural import PerlinNoise
from gambeson.base import generator, unknown_name
from gambeson.threat import Ball

CONTROLS = {"random-sign": 10, "chessboard": 1}
"""Controls of every audit, and the number of patterns of each; the chessboard is a single fixed pattern."""
MORE_CONTROLS = {"uniform": 10, "constant-shift": 8, "stripes": 4, "perlin": 100}
"""Optional controls, which cost only forward passes. Uniform noise in the ball does less harm than random signs on its
surface. The best of 100 Perlin patterns is already a black-box attack."""


def control(name: str, ball: Ball, shape: tuple[int, ...], *, draws: int = 1, seed: int = 0) -> torch.Tensor:
    """Return up to ``draws`` patterns for images of ``shape`` (C, H, W), shape (draws, C, H, W), inside the ball.

    All but ``uniform`` have norm eps.

    - ``random-sign``: +-eps at every value, independently.
    - ``chessboard``: +-eps with a period of two pixels, equal in all channels, -eps at the top left.
    - ``uniform``: drawn uniformly from the ball.
    - ``constant-shift``: every channel shifted by +-eps; there are 2**C of these, the first of which darkens all
    channels.
    - ``stripes``: +-eps in rows and in columns with periods of two and of four pixels, -eps at the top left; four.
    - ``perlin``: Perlin noise (Co et al. 2019) whose parameters are drawn from the box of :class:`PerlinNoise`.

    The periods of the stripes and the box of the Perlin noise at sizes other than 299 pixels are ours.

    Raises:
        UserError: no such control.
    """
    draw = generator(seed, "control", name)
    if name == "random-sign":
        return ball.signs((draws, *shape), draw)
    if name == "uniform":
        return ball.uniform((draws, *shape), draw)
    channels, rows, columns = shape[0], torch.arange(shape[1]).view(-1, 1), torch.arange(shape[2]).view(1, -1)
    if name == "chessboard":
        return ball.fill(_plus_minus(rows + columns).expand(draws, *shape))
    if name == "constant-shift":
        count = min(draws, 2**channels)
        signs = torch.tensor([[(k >> c) & 1 for c in range(channels)] for k in range(count)]) * 2.0 - 1
        return ball.fill(signs[:, :, None, None].expand(-1, *shape))
    if name == "stripes":
        every = [_plus_minus(places // (period // 2)) for period in (2, 4) for places in (rows, columns)]
        return torch.cat([ball.fill(stripes.expand(1, *shape)) for stripes in every[:draws]])
    if name == "perlin":
        noise = PerlinNoise(eps=ball.eps, norm=ball.norm)
        box = torch.tensor(noise.bounds((shape[1], shape[2])), dtype=torch.float64)
        patterns = []
        for _ in range(draws):
            place = torch.rand(len(box), generator=draw, dtype=torch.float64)
            number = int(torch.randint(2**32, (), generator=draw))
            values = (box[:, 0] + place * (box[:, 1] - box[:, 0])).tolist()
            patterns.append(noise.delta(shape, values, number))
        return torch.cat(patterns)
    raise unknown_name("control", name, CONTROLS | MORE_CONTROLS)


def _plus_minus(places: torch.Tensor) -> torch.Tensor:
    """Return -1 at even places, 1 at odd ones."""
    return (places % 2 * 2 - 1).float()
