"""The models of the testbed by data set, and loading of a model with its data and ground truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from gambeson.base import unknown_name
from gambeson.data import Dataset
from gambeson.testbed.entry import Entry
from gambeson.testbed.obfuscations import OBFUSCATED
from gambeson.testbed.recipes import DATA, HONEST, networks, settings_of
from gambeson.testbed.suspicious import SUSPICIOUS
from gambeson.testbed.truth import GroundTruth, ground_truth


@dataclass(frozen=True, kw_only=True)
class TestbedModel:
    """A model of the testbed, returned by :func:`load`."""

    __test__ = False  # not for pytest

    entry: Entry
    model: nn.Module
    """Images (N, C, H, W) in [0, 1] to logits, in evaluation mode; a new copy, including its state."""
    data: Dataset
    truth: GroundTruth
    undefended: GroundTruth
    """Ground truth of the undefended network, which most obfuscated models are made of."""


def models(data: str = "digits") -> list[Entry]:
    """List the models of the testbed on a data set: obfuscated ones by family, then the honest ones.

    Args:
        data: ``digits``, ``mnist5k`` and ``fashion-mnist`` have all models; ``cifar10`` all but those that lose more
            than 14 points of clean accuracy there.

    Raises:
        UserError: the testbed has no such data.
    """
    without = settings_of(data).without
    return [entry for entry in (*OBFUSCATED, *HONEST, *SUSPICIOUS) if entry.name not in without]


LISTING = ("name", "kind", "honest", "how", "source", "held_out", "library")
"""What a listing says of an entry."""


def listing() -> dict[str, Any]:
    """Return all models, and their names by data set, as stored in ``models.json`` for listings in no time.

    ``python -m gambeson.testbed.library > src/gambeson/testbed/models.json`` stores it; a test fails while it is stale.
    """
    every = [{key: getattr(entry, key) for key in LISTING} for entry in (*OBFUSCATED, *HONEST, *SUSPICIOUS)]
    return {"models": every, "data": {data: [entry.name for entry in models(data)] for data in DATA}}


def entry_of(name: str, data: str) -> Entry:
    """Return an entry by name.

    Raises:
        UserError: no such entry on this data.
    """
    known = {entry.name: entry for entry in models(data)}
    if name not in known:
        raise unknown_name(f"model of the testbed on {data}", name, known)
    return known[name]


def load(name: str, data: str = "digits") -> TestbedModel:
    """Load a model with its data and its ground truth.

    Networks are trained on first use, in seconds on the digits, from fixed seeds, and cached in ``testbed/`` of the
    data folder ($GAMBESON_DATA, else ~/.cache/gambeson), as is the ground truth.

    Args:
        name: of an entry of :func:`models`.
        data: ``digits``, ``mnist5k``, ``fashion-mnist`` or ``cifar10``.

    Raises:
        UserError: no such model or data.
    """
    entry, nets = entry_of(name, data), networks(data)
    return TestbedModel(
        entry=entry,
        model=entry.build(nets),
        data=nets.data,
        truth=ground_truth(entry, data),
        undefended=ground_truth(entry_of("standard", data), data),
    )


if __name__ == "__main__":
    print(json.dumps(listing(), indent=1, sort_keys=True))
