"""Statistics of a split, gathered over its pieces so that they need little memory beside the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

Pieces = Iterable[tuple[torch.Tensor, torch.Tensor]]


def fingerprint(pieces: Pieces, count: int) -> str:
    """Return 16 hex digits of a sha256 over images, labels, types and shapes, however they are cut up."""
    pixels, truth = hashlib.sha256(), hashlib.sha256()
    heads: list[Any] = [count]
    for images, labels in pieces:
        pixels.update(images.cpu().contiguous().numpy().data)
        truth.update(labels.cpu().contiguous().numpy().data)
        heads[1:] = [images.dtype, tuple(images.shape[1:]), tuple(labels.shape[1:])]
    return hashlib.sha256(f"{heads} {pixels.hexdigest()} {truth.hexdigest()}".encode()).hexdigest()[:16]


def moments(pieces: Pieces, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the population standard deviation of each channel, in pixel units."""
    first, second = torch.zeros(2, channels, dtype=torch.float64)
    total = 0
    for images, _ in pieces:
        rows = images.transpose(0, 1).flatten(1)
        total += rows.shape[1]
        if images.is_floating_point():
            values = rows.double()
            first += values.sum(1).cpu()
            second += values.square().sum(1).cpu()
        else:  # counting the 256 values is exact and needs no float copy of the data
            level = torch.arange(256, dtype=torch.float64) / 255
            counts = torch.stack([torch.bincount(row, minlength=256) for row in rows]).cpu().double()
            first += counts @ level
            second += counts @ level.square()
    mean = first / max(1, total)
    std = (second / max(1, total) - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
