"""Fixed, stratified partitions: which items a split gets depends on the data's name and labels alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gambeson.base.seeds import generator


def pick(labels: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Pick ``count`` items at random so that every class gives its share, rounded down or up.

    Systematic sampling: the items are shuffled, lined up by class, and every (N / count)-th one is taken.
    Label maps have no one class an item, so they are only shuffled.

    Args:
        labels: (N,) or (N, H, W).
        count: how many items, at most N.
        draw: a CPU generator.

    Returns:
        A mask (N,) with ``count`` True entries.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=draw)
    if labels.ndim == 1:
        order = order[labels[order].argsort(stable=True)]
    ticks = torch.arange(len(labels) + 1) * count // max(1, len(labels))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[ticks.diff() > 0]] = True
    return mask


def partition(labels: torch.Tensor, counts: Sequence[int], name: str, seed: int = 0) -> list[torch.Tensor]:
    """Cut the items into disjoint stratified parts.

    Args:
        labels: (N,) or (N, H, W).
        counts: the size of every part after the first, which gets the rest.
        name: the name of the data, which names the random stream.
        seed: the seed of the partition.

    Returns:
        One sorted LongTensor of item numbers a part; the first part comes first.
    """
    rest = torch.arange(len(labels))
    parts = []
    for number, count in enumerate(counts):
        chosen = pick(labels[rest.to(labels.device)], count, generator(seed, "split", name, number))
        parts.append(rest[chosen])
        rest = rest[~chosen]
    return [rest, *parts]
