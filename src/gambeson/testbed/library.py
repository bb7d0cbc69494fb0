"""What the testbed offers: its entries by data set, a ready model with its data, and the ground truth about it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import Config, UserError, derive, read_json, seeded, unknown_name, write_json
from gambeson.data import Dataset, Split
from gambeson.data.load import data_root
from gambeson.evaluation import Rate
from gambeson.testbed.entry import Entry, Networks
from gambeson.testbed.networks import HONEST, material_of, networks
from gambeson.testbed.obfuscations import OBFUSCATED
from gambeson.testbed.obfuscations.preprocessing import Before

VOTES = 21
"""Passes over a random model whose majority decides an image (ours)."""


class GroundTruth(Config):
    """What is known about a model, by a way around its obfuscation that an attacker who reads its code has.

    Both rates are decided on the model itself, never on what the perturbations were crafted on, so that they are true
    bounds: the model is no more robust than they say.
    """

    eps: float
    """Radius of the l-infinity ball, pixels in [0, 1]."""
    clean: Rate
    """Accuracy on clean images."""
    accuracy: Rate
    """Robust accuracy is at most this: the share of images that none of the perturbations, one per image, breaks."""
    uer: Rate
    """The universal evasion rate is at least this."""
    how: str
    """How this is known."""


@dataclass(frozen=True)
class TestbedModel:
    """What :func:`load` returns."""

    __test__ = False  # not for pytest

    entry: Entry
    model: nn.Module
    """Images (N, C, H, W) in [0, 1] to logits, in evaluation mode; its own copy, also of what it remembers."""
    data: Dataset
    truth: GroundTruth
    undefended: GroundTruth
    """The same of the undefended network, which most obfuscated models are made of."""


def models(data: str = "digits") -> list[Entry]:
    """List the models of the testbed on a data set: obfuscated ones by family, then the honest ones.

    Args:
        data: ``digits`` and ``mnist5k`` have all of them, ``fashion-mnist`` and ``cifar10`` honest ones only.

    Raises:
        UserError: the testbed has no such data.
    """
    only = material_of(data).only
    return [*OBFUSCATED, *HONEST] if only is None else [entry for entry in HONEST if entry.name in only]


def entry_of(name: str, data: str) -> Entry:
    """Look an entry up by its name.

    Raises:
        UserError: there is none on this data.
    """
    known = {entry.name: entry for entry in models(data)}
    if name not in known:
        raise unknown_name(f"model of the testbed on {data}", name, known)
    return known[name]


def build(entry: Entry, nets: Networks) -> nn.Module:
    """Build a model of an entry, always the same."""
    with seeded(0, "testbed", entry.name):
        return entry.build(nets)


def load(name: str, data: str = "digits") -> TestbedModel:
    """Load a model with its data and its ground truth.

    What it is made of is trained when it is first asked for, in seconds on the digits, from a fixed seed, and kept in
    ``testbed/`` of the folder of downloads ($GAMBESON_DATA, else ~/.cache/gambeson), as is the ground truth.

    Args:
        name: of an entry of :func:`models`.
        data: ``digits``, ``mnist5k``, ``fashion-mnist`` or ``cifar10``.

    Raises:
        UserError: there is no such model or data.
    """
    entry, nets = entry_of(name, data), networks(data)
    return TestbedModel(
        entry, build(entry, nets), nets.data, ground_truth(entry, data), ground_truth(entry_of("standard", data), data)
    )


@contextmanager
def python_seeded(seed: int, *path: str) -> Iterator[None]:
    """Seed torch's global generators and Python's own inside the block: some models draw from either."""
    state = random.getstate()
    random.seed(derive(seed, *path))
    try:
        with seeded(seed, *path):
            yield
    finally:
        random.setstate(state)


class StraightThrough(nn.Module):
    """The way around a change of the pixels: what it does forwards, the identity backwards (BPDA).

    Athalye et al. 2018, section 4.1.
    """

    def __init__(self, model: Before) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        with torch.no_grad():
            changed = self.model.change(x)
        return self.model.net(x + (changed - x).detach())


def ways(entry: Entry, nets: Networks) -> dict[str, nn.Module]:
    """Return what an attacker who reads the model's code crafts perturbations on, by name."""
    model = build(entry, nets)
    found: dict[str, nn.Module] = {"the model itself": model}
    if not entry.honest:
        found["the network underneath"] = nets()
    if isinstance(model, Before):
        found["the network underneath, straight through the change of pixels"] = StraightThrough(model)
    return found
