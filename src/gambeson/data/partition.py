"""Stratified sampling: the fixed partition of a data set into splits, and random subsets of a split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gambeson.base.seeds import generator
from gambeson.tasks import of as task_of


def pick(labels: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Pick ``count`` items at random so that every class contributes its share, rounded down or up.

    Systematic sampling: the items are shuffled, lined up by class, and every (N / count)-th one is taken.
    Label maps have no single class per item and are only shuffled.

    Args:
        labels: (N,) or (N, H, W).
        count: how many items, at most N.
        draw: a CPU generator.

    Returns:
        A mask (N,) with ``count`` True entries.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=draw)
    if task_of(labels).per_image_label:
        order = order[labels[order].argsort(stable=True)]
    ticks = torch.arange(len(labels) + 1) * count // max(1, len(labels))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[ticks.diff() > 0]] = True
    return mask


def stratified(labels: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Draw ``count`` items at random so that every class keeps its share, by the method of largest remainders.

    A class of n items among N gets ``n * count / N`` of them, rounded down; the remaining items go to the classes with
    the largest remainders, with ties broken at random. A rate over the sample thus estimates the rate over all items;
    with equally large classes, no class gets two items more than another.

    Args:
        labels: (N,).
        count: how many items, 0 to N.
        draw: a CPU generator.

    Returns:
        Item numbers (count,), ascending, so that streams are read in order.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=draw)
    codes, sizes = labels.unique(return_inverse=True, return_counts=True)[1:]
    shares, remainders = sizes * count // max(1, len(labels)), sizes * count % max(1, len(labels))
    among_equals = torch.randperm(len(sizes), generator=draw)
    ranked = among_equals[remainders[among_equals].argsort(descending=True, stable=True)]
    shares[ranked[: count - int(shares.sum())]] += 1
    by_class = order[codes[order].argsort(stable=True)]
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return by_class[place < shares.repeat_interleave(sizes)].sort().values


def partition(labels: torch.Tensor, counts: Sequence[int], name: str, seed: int = 0) -> list[torch.Tensor]:
    """Cut the items into disjoint stratified parts.

    Args:
        labels: (N,) or (N, H, W).
        counts: the size of every part after the first, which gets the rest.
        name: the name of the data, which names the random stream.
        seed: the seed of the partition.

    Returns:
        One sorted LongTensor of item numbers per part; the first part comes first.
    """
    rest = torch.arange(len(labels))
    parts = []
    for number, count in enumerate(counts):
        chosen = pick(labels[rest.to(labels.device)], count, generator(seed, "split", name, number))
        parts.append(rest[chosen])
        rest = rest[~chosen]
    return [rest, *parts]
