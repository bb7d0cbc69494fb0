"""What the testbed offers: its entries by data set, and a ready model with its data and its ground truth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gambeson.base import unknown_name
from gambeson.data import Dataset
from gambeson.testbed.entry import Entry
from gambeson.testbed.obfuscations import OBFUSCATED
from gambeson.testbed.recipes import HONEST, material_of, networks
from gambeson.testbed.truth import GroundTruth, ground_truth


@dataclass(frozen=True, kw_only=True)
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
        entry=entry,
        model=entry.build(nets),
        data=nets.data,
        truth=ground_truth(entry, data),
        undefended=ground_truth(entry_of("standard", data), data),
    )
