"""Image folders: one sub-folder a class, with or without train, validation and test above them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from gambeson.base.errors import UserError
from gambeson.data import lazy
from gambeson.data.dataset import PARTS, Dataset, cut
from gambeson.data.items import fit, pil_tensor
from gambeson.data.lazy import LazySplit
from gambeson.data.partition import partition
from gambeson.data.split import Batch

SIZE = 224
"""Default side of the square that images are resized and cropped to: what ImageNet models expect."""
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
PART_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
SHARE = 0.15


class Files:
    """Loads images as uint8 RGB (3, size, size) with their labels.

    Raises:
        UserError: a file is not an image, or is damaged; the message names it.
    """

    def __init__(self, paths: list[Path], labels: torch.Tensor, size: int) -> None:
        self.paths, self.labels, self.size = paths, labels, size

    def __call__(self, number: int) -> Batch:
        """Load one image, turned upright, resized (shorter side) and centre-cropped."""
        path = self.paths[number]
        try:
            with Image.open(path) as image:
                pixels = pil_tensor(ImageOps.exif_transpose(image), grey=False)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as an image ({error}): replace it or take it out") from None
        return fit(pixels, self.size), self.labels[number]


def load_folder(path: Path, size: int | None = None) -> Dataset:
    """Load PATH/train, PATH/val (or validation) and PATH/test, or class folders directly under PATH.

    A part that is missing is cut from train, stratified, 15 % of it each; without parts all is cut 70/15/15.

    Args:
        path: the folder.
        size: side of the square, in pixels; 224 by default.

    Raises:
        UserError: no such folder, no class folders, no images, or classes that train does not have.
    """
    size = SIZE if size is None else size
    if size < 1:
        raise UserError(f"size = {size}: expected a number of pixels, 1 or more")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: expected one with a sub-folder a class, or train, val and test")
    name = path.resolve().name
    folders = {part: _first(path, names) for part, names in PART_FOLDERS.items()}
    if folders["train"] is None:
        if any(folders.values()):
            raise UserError(f"{path} has a test or validation folder but no train folder: add train, or flatten it")
        return _settled(cut(_scan(path, name, None, size), name, (SHARE, SHARE)))
    train = _scan(folders["train"], f"{name}/train", None, size)
    splits = {
        part: _scan(folder, f"{name}/{part}", train.classes, size)
        for part, folder in folders.items()
        if folder is not None and part != "train"
    }
    missing = [part for part in PARTS[1:] if part not in splits]
    counts = [max(2, round(len(train) * SHARE)) for _ in missing]
    if sum(counts) >= len(train):
        raise UserError(
            f"{folders['train']} has {len(train)} images, too few to cut {' and '.join(missing)} from: add more"
        )
    rest, *parts = partition(train.labels, counts, name)
    for part, index in zip(missing, parts, strict=True):
        splits[part] = train.subset(index, f"{name}/{part}")
    train = train.subset(rest, f"{name}/train")
    return _settled(Dataset(name, train, splits["validation"], splits["test"], train.classes))


def _first(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _scan(path: Path, name: str, classes: tuple[str, ...] | None, size: int) -> LazySplit:
    """List the images of the class folders under ``path``, in the order of their names."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"{path} has no sub-folders: expected one a class, with the images of that class in it")
    found = tuple(folder.name for folder in folders)
    strangers = sorted(set(found) - set(classes or found))
    if strangers:
        raise UserError(
            f"{path} has classes that train has not: {', '.join(strangers[:5])}; expected the same folders in both"
        )
    known = classes or found
    paths, labels = [], []
    for folder in folders:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        if not files:
            raise UserError(f"{folder} holds no images ({', '.join(sorted(ENDINGS))}): add some or take the folder out")
        paths += files
        labels += [known.index(folder.name)] * len(files)
    truth = torch.tensor(labels)
    return LazySplit(name, Files(paths, truth, size), truth, known)


def _settled(data: Dataset) -> Dataset:
    """Read everything into memory now, if all of it fits."""
    lazies = [getattr(data, part) for part in PARTS]
    total = sum(split.nbytes for split in lazies)
    if total > lazy.MEMORY_LIMIT:
        return data
    train, validation, test = (split.eager() for split in lazies)
    return Dataset(data.name, train, validation, test, data.classes)
