"""The one-pixel attack: differential evolution over the positions and colours of a few pixels."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from gambeson.attacks.query.base import QueryAttack, Search
from gambeson.attacks.registry import register
from gambeson.base import Number, generator


@register("one-pixel", source="Su et al. 2019", cost="at most queries / 0")
class OnePixel(QueryAttack):
    """One-pixel attack, or one on a few pixels, by differential evolution (Su et al. 2019, section III).

    A candidate has ``pixels`` positions with a colour each. In every generation each candidate gets one child a + F (b
    - d) from three random others, without crossover, which replaces its parent if its loss is higher. The fitness for
    targets is the cross-entropy, which orders candidates as the paper's probability does. Untargeted it is the margin
    (ours), because the probability of a confident model rounds to one; ``loss="cross-entropy"`` is the paper's fitness.
    Candidates of all images share batches. Two pixels of a candidate may coincide, so at most ``pixels`` change. Ours,
    where the paper is silent: an image is finished once it is adversarial, where the paper stops at a probability;
    positions outside the image are redrawn; colours are clipped. Cost: at most ``queries`` forwards per image.
    """

    pixels: Annotated[int, Field(ge=0)] = 1
    """Pixels that may change, in all channels (the paper: 1, 3 and 5)."""
    population: Annotated[int, Field(ge=4)] = 400
    """Candidates per image (the paper: 400)."""
    generations: Annotated[int, Field(ge=1)] = 100
    """Maximum number of generations (the paper: 100); the budget may end the search earlier."""
    factor: Annotated[Number, Field(gt=0)] = 0.5
    """F, the weight of a difference of two candidates (the paper: 0.5)."""
    batch_size: Annotated[int, Field(ge=1)] = 512
    """Candidates sent to the model at once."""

    @property
    def _null(self) -> bool:
        return self.pixels == 0

    def _search(self, search: Search, seed: int) -> None:
        x = search.images
        draw = generator(seed, "one-pixel", device=x.device)
        # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
        genes = self._fresh(x, draw)[search.active]
        value = genes.new_full(genes.shape[:2], -torch.inf)
        for generation in range(self.generations + 1):
            if len(search.active) == 0 or search.left == 0:
                break
            active, count = search.active, min(search.left, self.population)
            children = genes if generation == 0 else self._children(x, genes, active, draw)
            reached = self._judge(search, children[:, :count])
            better = reached > value[:, :count]
            value[:, :count] = torch.where(better, reached, value[:, :count])
            genes[:, :count] = torch.where(better[:, :, None, None], children[:, :count], genes[:, :count])
            still = torch.isin(active, search.active)
            genes, value = genes[still], value[still]

    def _fresh(self, x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Draw (N, population, pixels, 2 + C): positions uniform in [0, 1), colours around grey (paper)."""
        shape = (len(x), self.population, self.pixels)
        places = torch.rand(*shape, 2, generator=draw, device=draw.device)
        colours = torch.randn(*shape, x.shape[1], generator=draw, device=draw.device)
        return torch.cat([places, (128 / 255 + 127 / 255 * colours).clamp(0, 1)], -1).to(x.dtype)

    def _children(
        self, x: torch.Tensor, genes: torch.Tensor, active: torch.Tensor, draw: torch.Generator
    ) -> torch.Tensor:
        size = self.population
        picks = torch.rand(3, len(x), size, generator=draw, device=draw.device)[:, active]
        fresh = torch.rand(len(x), *genes.shape[1:3], 2, generator=draw, device=draw.device)[active]
        # Three different numbers below `size`: each is drawn among those left and shifted past the earlier ones.
        first, second, third = ((pick * (size - k)).long().clamp(max=size - k - 1) for k, pick in enumerate(picks))
        second = second + (second >= first)
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        third = third + (third >= low)
        third = third + (third >= high)
        rows = torch.arange(len(genes), device=genes.device)[:, None]
        child = genes[rows, first] + self.factor * (genes[rows, second] - genes[rows, third])
        places, colours = child[..., :2], child[..., 2:]
        inside = (places >= 0) & (places < 1)
        return torch.cat([torch.where(inside, places, fresh.to(places.dtype)), colours.clamp(0, 1)], -1)

    def _judge(self, search: Search, genes: torch.Tensor) -> torch.Tensor:
        """Query every candidate (A, P, ...); keep each image's best; return the losses (A, P)."""
        count, active = genes.shape[1], search.active
        owner = active.repeat_interleave(count)
        flat, values, downs = genes.flatten(0, 1), [], []
        for part in torch.arange(len(flat), device=flat.device).split(self.batch_size):
            value, down = search.ask(_paint(search.images[owner[part]], flat[part]), owner[part])
            values.append(value.to(genes.dtype))
            downs.append(down)
        value, down = torch.cat(values).view(-1, count), torch.cat(downs).view(-1, count)
        best = value.masked_fill(down, torch.inf).argmax(1)
        rows = torch.arange(len(genes), device=genes.device)
        search.keep(_paint(search.images[active], genes[rows, best]), value[rows, best], down.any(1))
        return value


def _paint(images: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    """Set the pixels of (M, pixels, 2 + C) in images (M, C, H, W); where two coincide the later one counts."""
    n, c, h, w = images.shape
    size = torch.tensor([h, w], device=images.device)
    place = torch.minimum((genes[..., :2] * size).long(), size - 1)
    painted = images.clone().flatten(2)
    for k in range(genes.shape[1]):
        index = (place[:, k, 0] * w + place[:, k, 1]).view(n, 1, 1).expand(n, c, 1)
        painted.scatter_(2, index, genes[:, k, 2:].unsqueeze(2))
    return painted.view_as(images)
