"""Scenes for semantic segmentation, composed from the items of a classification set on textured grounds.

Class 0 is the ground, class k + 1 the source's class k, and :data:`IGNORED` the border around every item. A scene has
the items of one split of the source only, and depends on the seed, the split and its number alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from gambeson.base.config import Config
from gambeson.base.seeds import generator
from gambeson.data.dataset import PARTS, Dataset
from gambeson.data.load import build, prepare
from gambeson.data.registry import DATASETS, register
from gambeson.data.split import Split

IGNORED = 255
"""The label of the pixels on both sides of an item's outline."""
ITEMS = (2, 4)
"""Fewest and most items of a scene."""
SCALES, ANGLE, SHIFT = (0.45, 0.6), math.pi / 12, 0.1
"""Side of an item in parts of the scene's; largest rotation either way, in radians; largest distance of an item's
centre from that of its quarter of the scene, each way. No two items are in one quarter, so that they hide parts of each
other and seldom all."""
INK = 0.1
"""Value from which a source's pixel belongs to the item."""
WAVES, SHADES, GRAIN = 3, 9, 0.06
"""Of a ground: the plane waves, the knots per side of its smooth noise, and the width of its noise per pixel."""
BLOCK = 25
"""Scenes that are drawn together, from one generator; more would leave the processor's cache."""


class SceneOptions(Config):
    """What scenes are composed; in a name ``?size=128,seed=1``."""

    size: Annotated[int, Field(ge=32, le=512)] = 64
    """Side of a scene in pixels; the same seed gives the same scenes in every size."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of items, and of everything about their place and colour."""
    train: Annotated[int, Field(ge=2)] = 4000
    """Scenes in train; fewer are the first of more, and likewise below."""
    validation: Annotated[int, Field(ge=2)] = 500
    """Scenes in validation."""
    test: Annotated[int, Field(ge=2)] = 1000
    """Scenes in test."""


def scenes(name: str, source: str, root: Path, options: SceneOptions, *, clothes: bool) -> Dataset:
    """Compose the three splits from those of the source: no item of one is in another.

    Args:
        name: of the scenes.
        source: the named set of the items, grey on black.
        root: the data folder.
        options: what is composed.
        clothes: whether items have dark parts that belong to them, and are the same in the mirror, unlike digits.
    """
    spec = DATASETS[source]
    items = build(spec, *prepare(spec, root))
    classes = ("ground", *items.classes)
    splits: dict[str, Split] = {}
    for part in PARTS:
        split: Split = getattr(items, part)
        count = getattr(options, part)
        order = _order(len(split), count * ITEMS[1], generator(options.seed, name, part))
        blocks = [
            compose(split, order[at * ITEMS[1] :], options.size, generator(options.seed, name, part, at), clothes)
            for at in range(0, count, BLOCK)
        ]
        images, maps = (torch.cat(some)[:count] for some in zip(*blocks, strict=True))
        splits[part] = Split(f"{name}/{part}", images, maps, classes, ignore_index=IGNORED)
    return Dataset(name, splits["train"], splits["validation"], splits["test"], classes)


def _order(items: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """Return item numbers, at least ``count``: none comes again before all have come."""
    return torch.cat([torch.randperm(items, generator=draw) for _ in range(-(-(count + BLOCK * ITEMS[1]) // items))])


def compose(
    items: Split, numbers: torch.Tensor, size: int, draw: torch.Generator, clothes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose :data:`BLOCK` scenes, painting the items one over the other.

    Everything is computed in float64, so that rounding to bytes gives the same scenes on every machine.

    Args:
        items: grey items on black, (N, 1, h, w).
        numbers: of the items, 4 per scene; a scene of fewer leaves the last ones out.
        size: height and width of the scenes.
        draw: a CPU generator.
        clothes: as for :func:`scenes`.

    Returns:
        Images (:data:`BLOCK`, 3, size, size) and label maps (:data:`BLOCK`, size, size), both uint8.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(BLOCK, *shape, generator=draw, dtype=torch.float64)

    most = ITEMS[1]
    chosen = numbers[: BLOCK * most]
    counts = torch.randint(ITEMS[0], most + 1, (BLOCK,), generator=draw)
    sides, angles = uniform(most, low=SCALES[0], high=SCALES[1]), uniform(most, low=-ANGLE, high=ANGLE)
    quarters, mirrored = uniform(most).argsort(1), (uniform(most) < 0.5) & clothes
    centres = 0.25 + 0.5 * torch.stack([quarters % 2, quarters // 2], -1) + uniform(most, 2, low=-SHIFT, high=SHIFT)
    tints = uniform(most, 3, low=0.2)
    canvas = grounds(size, uniform(2, 3), uniform(WAVES, 3), uniform(3, SHADES, SHADES))
    canvas += GRAIN * (torch.rand(canvas.shape, generator=draw, dtype=torch.float64) - 0.5)
    planes = _planes(items.images[chosen].double() / 255, solid=clothes)
    drawn = _placed(planes, size, sides, angles, centres, mirrored)
    owner = torch.zeros(BLOCK, size, size, dtype=torch.uint8)
    maps = torch.zeros(BLOCK, size, size, dtype=torch.uint8)
    classes = (items.labels[chosen] + 1).to(torch.uint8).view(BLOCK, most)
    for k in range(most):
        value, cover = drawn[:, k].unbind(1)
        cover = cover * (k < counts)[:, None, None]
        colour = tints[:, k, :, None, None] * (0.25 + 0.75 * value[:, None])
        canvas = torch.lerp(canvas, colour, cover[:, None])
        inside = cover >= 0.5
        owner[inside] = k + 1
        maps = torch.where(inside, classes[:, k, None, None], maps)
    maps[outline(owner, max(1, size // 64))] = IGNORED
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8), maps


def grounds(size: int, colours: torch.Tensor, waves: torch.Tensor, shades: torch.Tensor) -> torch.Tensor:
    """Return textures between two colours: plane waves, plus smooth noise in each channel.

    Args:
        size: their height and width.
        colours: (N, 2, 3) in [0, 1].
        waves: (N, W, 3) in [0, 1]: direction, frequency (2 to 12 periods a side) and phase of each.
        shades: (N, 3, k, k) in [0, 1], the noise at its knots.

    Returns:
        (N, 3, size, size).
    """
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    turn = 2 * math.pi * waves[..., 0, None]
    periods, phase = 2 * math.pi * (2 + 10 * waves[..., 1, None]), 2 * math.pi * waves[..., 2, None]
    rows, columns = periods * turn.sin() * axis + phase, periods * turn.cos() * axis
    # sin(a + b) from its factors: a product of small matrices in place of a sine per pixel.
    wave = rows.sin().transpose(1, 2) @ columns.cos() + rows.cos().transpose(1, 2) @ columns.sin()
    blend = 0.5 + 0.5 * wave[:, None] / waves.shape[1]
    noise = F.interpolate(shades, (size, size), mode="bicubic", align_corners=True) - 0.5
    return torch.lerp(colours[:, 0, :, None, None], colours[:, 1, :, None, None], blend) + 0.4 * noise


def outline(owner: torch.Tensor, width: int) -> torch.Tensor:
    """Return the pixels (N, H, W) that have a pixel of another owner at most ``width`` rows and columns away."""
    most = least = owner
    for axis, side in ((1, owner.shape[1]), (2, owner.shape[2])):
        near = [(torch.arange(side) + step).clamp(0, side - 1) for step in range(-width, width + 1)]
        most = torch.stack([most.index_select(axis, one) for one in near]).amax(0)
        least = torch.stack([least.index_select(axis, one) for one in near]).amin(0)
    return most != least


def _planes(value: torch.Tensor, solid: bool) -> torch.Tensor:
    """Return the value and the cover, (N, 2, h, w), of items (N, 1, h, w) on black."""
    ink = value >= INK
    if solid:  # what has ink on all four sides is dark cloth, not ground
        ways = [(ink.cumsum(axis) > 0, ink.flip(axis).cumsum(axis).flip(axis) > 0) for axis in (2, 3)]
        ink = ways[0][0] & ways[0][1] & ways[1][0] & ways[1][1]
    return torch.cat([value, ink.double()], 1)


def _placed(
    planes: torch.Tensor,
    size: int,
    sides: torch.Tensor,
    angles: torch.Tensor,
    centres: torch.Tensor,
    mirrored: torch.Tensor,
) -> torch.Tensor:
    """Return the planes of every item in its place, (N, M, 2, size, size)."""
    cos, sin = angles.cos() / sides, angles.sin() / sides
    line = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    x, y = (line - (2 * centres[..., None] - 1)).unbind(2)
    x, y = x[:, :, None, :], y[:, :, :, None]
    cos, sin = cos[..., None, None], sin[..., None, None]
    across = torch.where(mirrored, -1.0, 1.0)[..., None, None] * (cos * x - sin * y)
    grid = torch.stack([across, sin * x + cos * y], -1).flatten(0, 1)
    return F.grid_sample(planes, grid, padding_mode="zeros", align_corners=False).view(*sides.shape, 2, size, size)


def _about(source: str, what: str) -> dict[str, Any]:
    """Describe the scenes of a source for the registry and its catalogue."""
    spec, counts = DATASETS[source], SceneOptions()
    about = {
        "how": f"composed in some seconds from {source}, which is {spec.how}",
        **{part: getattr(counts, part) for part in PARTS},
        "shape": (3, counts.size, counts.size),
        "classes": spec.num_classes + 1,
        "licence": spec.licence,
    }
    summary = f"scenes of {ITEMS[0]} to {ITEMS[1]} {what} on textured grounds, 64x64 RGB, for segmentation"
    return {"settings": SceneOptions, "source": source, "about": about, "summary": summary}


@register("fashion-scenes", **_about("fashion-mnist", "garments of Fashion-MNIST"))
def fashion_scenes(root: Path, options: SceneOptions) -> Dataset:
    """Compose scenes of garments."""
    return scenes("fashion-scenes", "fashion-mnist", root, options, clothes=True)


@register("digit-scenes", **_about("mnist5k", "digits of mnist5k"))
def digit_scenes(root: Path, options: SceneOptions) -> Dataset:
    """Compose scenes of digits, for which nothing is downloaded."""
    return scenes("digit-scenes", "mnist5k", root, options, clothes=False)
