"""Image folders: one sub-folder per class, optionally below train, validation and test."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from gambeson.base.errors import UserError
from gambeson.data.dataset import Dataset, complete, cut, settled
from gambeson.data.lazy import LazySplit
from gambeson.data.split import Batch, Split
from gambeson.data.torch_dataset import UNREADABLE, fit, pil_tensor

SIZE = 224
"""Default side of the square that images are resized and cropped to: the size ImageNet models expect."""
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
PART_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
SHARE = 0.15


class Files:
    """Loads images as uint8 RGB (3, size, size) with their labels.

    Raises:
        UserError: a file is not an image, or is damaged; the message names it.
    """

    def __init__(self, paths: list[Path], labels: torch.Tensor, size: int) -> None:
        # One array: reference counting would make every worker copy a million Path objects.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.size = labels, size

    def __call__(self, number: int) -> Batch:
        """Load one image, turned upright, resized (shorter side) and centre-cropped."""
        path = os.fsdecode(bytes(self.paths[number]))
        try:
            with Image.open(path) as image:
                pixels = pil_tensor(ImageOps.exif_transpose(image), grey=False)
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it") from None
        return fit(pixels, self.size), self.labels[number]


def load_folder(path: Path, size: int | None = None, workers: int | None = None) -> Dataset:
    """Load PATH/train, PATH/val (or validation) and PATH/test, or class folders directly under PATH.

    Missing splits are cut from train, stratified, 15 % each; without splits everything is cut 70/15/15.

    Args:
        path: the folder.
        size: side of the square, in pixels; 224 by default.
        workers: processes that prefetch the images, see :class:`LazySplit`.

    Raises:
        UserError: no such folder, no class folders, no images, or classes that train lacks.
    """
    size = SIZE if size is None else size
    if size < 1:
        raise UserError(f"size = {size}: expected a number of pixels, 1 or more")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: expected one with a sub-folder per class, or train, val and test")
    name = path.resolve().name
    folders = {part: _first(path, names) for part, names in PART_FOLDERS.items()}
    if folders["train"] is None:
        if any(folders.values()):
            raise UserError(f"{path} has a test or validation folder but no train folder: add train, or flatten it")
        return settled(cut(_scan(path, name, None, size, workers), name, (SHARE, SHARE)))
    train = _scan(folders["train"], f"{name}/train", None, size, workers)
    splits: dict[str, Split] = {"train": train}
    for part, folder in folders.items():
        if folder is not None and part != "train":
            splits[part] = _scan(folder, f"{name}/{part}", train.classes, size, workers)
    return settled(complete(splits, name, SHARE))


def _first(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _scan(path: Path, name: str, classes: tuple[str, ...] | None, size: int, workers: int | None) -> LazySplit:
    """List the images of the class folders under ``path``, in the order of their names."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"{path} has no sub-folders: expected one per class, with the images of that class in it")
    found = tuple(folder.name for folder in folders)
    strangers = sorted(set(found) - set(classes or found))
    if strangers:
        raise UserError(
            f"{path} has classes that train lacks: {', '.join(strangers[:5])}; expected the same folders in both"
        )
    known = classes or found
    paths, labels = [], []
    for folder in folders:
        # os.walk reads each folder once, not each file.
        within = (Path(above, file) for above, _, files in os.walk(folder) for file in files)
        files = sorted(file for file in within if file.suffix.lower() in ENDINGS)
        if not files:
            raise UserError(f"{folder} holds no images ({', '.join(sorted(ENDINGS))}): add some or remove the folder")
        paths += files
        labels += [known.index(folder.name)] * len(files)
    truth = torch.tensor(labels)
    return LazySplit(name, Files(paths, truth, size), truth, known, workers=workers)
