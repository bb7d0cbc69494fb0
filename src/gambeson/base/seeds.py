"""Random streams, the only source of random numbers: named by the run's seed and a path, not by what ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *path: str | int) -> int:
    """Derive a 63-bit seed from the run's seed and the name of a stream.

    Streams depend on their names only, so a resumed run draws the same numbers as an uninterrupted one.
    """
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device`` for the stream ``path`` of the run ``seed``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *path))


@contextmanager
def seeded(seed: int, *path: str | int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block, and restore them.

    For code without a ``generator`` argument: a user's model may draw from any of them.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # torch.manual_seed formats the stack for accelerators to come, which takes longer than a small model's answer.
    seed_torch = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    own, python, legacy = derive(seed, *path), random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=devices):
            seed_torch(own)
            random.seed(own)
            np.random.seed(own % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
