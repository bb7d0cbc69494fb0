"""Controls: patterns that use no information about the model, which a crafted perturbation must beat.

A control is itself a universal perturbation: if it does more harm than the crafted one, it bounds the model's
robustness (:func:`gambeson.evaluation.strongest`).
"""

from __future__ import annotations

import torch

from gambeson.attacks.universal.adversarial_patch import AdversarialPatch
from gambeson.attacks.universal.procedural import PerlinNoise
from gambeson.base import generator, unknown_name
from gambeson.data import Split
from gambeson.threat import Ball

CONTROLS = {"random-sign": 10, "chessboard": 1}
"""Controls of every audit, and the number of patterns of each; the chessboard is a single fixed pattern."""
MORE_CONTROLS = {"uniform": 10, "constant-shift": 8, "stripes": 4, "perlin": 100}
"""Optional controls, which cost only forward passes. Uniform noise in the ball does less harm than random signs on its
surface. The best of 100 Perlin patterns is already a black-box attack."""
PATCH_CONTROLS = {"grey": 1, "uniform": 10, "random-sign": 10, "image-piece": 10}
"""Controls of a patch, and the number of patterns of each (ours)."""


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


def patch_control(name: str, patch: AdversarialPatch, images: Split, *, seed: int = 0) -> torch.Tensor:
    """Return patterns of a patch's size that know nothing of the model, (draws, C, h, w), for its mask and placement.

    - ``grey``: 0.5 everywhere.
    - ``uniform``: every value drawn uniformly from those the patch may have.
    - ``random-sign``: every value black or white, independently.
    - ``image-piece``: pieces of as many images, cut out at random; of images of the target's class if there are some,
      so that a patch has to do better than the real thing (Brown et al. 2017), else of one class after another.

    Args:
        name: the control.
        patch: what it stands beside.
        images: that pieces are cut from.
        seed: of the draws.

    Raises:
        UserError: no such control.
    """
    if name not in PATCH_CONTROLS:
        raise unknown_name("control", name, PATCH_CONTROLS)
    draws, draw, (_, channels, height, width) = (
        PATCH_CONTROLS[name],
        generator(seed, "patch control", name),
        patch.pattern.shape,
    )
    shape, ball = (draws, channels, height, width), Ball(eps=patch.about.eps)
    if name == "grey":
        return torch.full(shape, 0.5)
    if name in ("uniform", "random-sign"):
        return 0.5 + (ball.uniform if name == "uniform" else ball.signs)(torch.Size(shape), draw)
    target = None if patch.target is None else patch.target.within(images).index
    return image_pieces(images, (height, width), draws, draw, target)


def image_pieces(
    images: Split, size: tuple[int, int], draws: int, draw: torch.Generator, target: int | None = None
) -> torch.Tensor:
    """Return pieces of as many images, cut out at random, (draws, C, h, w) in [0, 1].

    Args:
        images: that they are cut from.
        size: their height and width.
        draws: their number; of fewer images there are fewer.
        draw: a CPU generator.
        target: of images of this class, if there are some; else of one class after another.
    """
    labels, order = images.labels.cpu(), torch.randperm(len(images), generator=draw)
    own = order[labels[order] == target]
    if len(own) == 0:
        # The first image of each class, then the second of each, and so on.
        turn = torch.zeros(len(order), dtype=torch.int64)
        for label in labels.unique():
            turn[labels[order] == label] = torch.arange(int((labels == label).sum()))
        own = order[(turn * (int(labels.max()) + 1) + labels[order]).argsort(stable=True)]
    (height, width), pieces = size, []
    for image in images.take(own[:draws])[0].cpu():
        top, left = (
            int(torch.randint(a - b + 1, (), generator=draw)) for a, b in zip(image.shape[1:], size, strict=True)
        )
        pieces.append(image[:, top : top + height, left : left + width])
    return torch.stack(pieces)


def _plus_minus(places: torch.Tensor) -> torch.Tensor:
    """Return -1 at even places, 1 at odd ones."""
    return (places % 2 * 2 - 1).float()
