"""Statistics of a split, gathered over its pieces so that they need little memory beside the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Pieces = Iterable[tuple[torch.Tensor, torch.Tensor]]


_BLOCK_BYTES = 2**20
"""Pixels are hashed in blocks of this size, which stay in the processor's cache."""


def digests(pieces: Pieces, count: int) -> tuple[str, torch.Tensor]:
    """Identify a split and each of its images, in one pass and however they are cut up.

    Returns:
        16 hex digits of a sha256 over images, labels, types and shapes; and :func:`image_hashes` of all images (N,).
    """
    pixels, truth = hashlib.sha256(), hashlib.sha256()
    heads: list[Any] = [count]
    hashes = [torch.empty(0, dtype=torch.int64)]
    for images, labels in pieces:
        hashes.append(image_hashes(images))
        pixels.update(images.cpu().contiguous().numpy().data)
        truth.update(labels.cpu().contiguous().numpy().data)
        heads[1:] = [images.dtype, tuple(images.shape[1:]), tuple(labels.shape[1:])]
    whole = hashlib.sha256(f"{heads} {pixels.hexdigest()} {truth.hexdigest()}".encode()).hexdigest()[:16]
    return whole, torch.cat(hashes)


def image_hashes(images: torch.Tensor) -> torch.Tensor:
    """Hash the content of every image to 64 bits; the same on every machine and in every version, for it is stored.

    Floats in [0, 1] are rounded to the nearest of 256 grey levels, so that they have the hash of their uint8 form.
    Each 8 bytes of an image, with a key of their place added, go through the mixer of SplitMix64 (Steele et al. 2014),
    and the sum of all goes through it again. Two different images share a hash by chance once in 2^64 pairs: among
    50,000 images and 10,000 others never in practice. It is no protection against hashes that were forged.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].

    Returns:
        (N,) int64, on the CPU.
    """
    if images.is_floating_point():
        images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    rows = images.flatten(1).cpu()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).contiguous()
    words = rows.numpy().view("<u8").astype(np.uint64, copy=False)
    keys = _mixed(np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    size = max(1, _BLOCK_BYTES // max(8, rows.shape[1]))
    found = [_mixed(words[at : at + size] + keys).sum(1, dtype=np.uint64) for at in range(0, len(words), size)]
    return torch.from_numpy(_mixed(np.concatenate(found)).view(np.int64)) if found else torch.empty(0).long()


def _mixed(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Mix 64-bit words in place, modulo 2^64: every bit of the outcome depends on every bit of the word."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


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
