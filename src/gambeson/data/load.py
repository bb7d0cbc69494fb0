"""The front door: a name, a pair, a torch Dataset or an image folder becomes a Dataset."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gambeson.base.errors import UserError, unknown_name
from gambeson.data.dataset import Dataset, as_dataset
from gambeson.data.folder import load_folder
from gambeson.data.prepare import build, prepare, stored_file
from gambeson.data.registry import RECIPES, Recipe
from gambeson.data.torchvision_sets import fetch_torchvision, load_torchvision

FOLDER = "image-folder:"
TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    name: str
    """What :func:`load` takes."""
    description: str
    train: int
    """Images to train on, validation taken off."""
    validation: int
    test: int
    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    licence: str
    """As the source states it."""
    ready: bool
    """Whether it is on disk already, so that loading needs neither network nor other packages."""
    how: str
    """Where it comes from otherwise."""


def load(
    name_or_data: Any, root: str | Path | None = None, *, size: int | None = None, workers: int | None = None
) -> Dataset:
    """Load a data set, fetching it first if need be.

    Sets of up to 4 GiB are read into memory, larger ones stay on disk and are read ahead of the compute, each image
    once a pass, whatever the number of workers.

    Args:
        name_or_data: digits, mnist5k, mnist, fashion-mnist, cifar10, cifar100, image-folder:PATH or torchvision:NAME;
            or an (images, labels) pair of tensors or arrays, a Split, or a torch Dataset of (image, label) items,
            which are cut 70/15/15. A name may end in ``?size=64``.
        root: the folder of downloads; by default $GAMBESON_DATA or ~/.cache/gambeson.
        size: side in pixels of the square that images are resized and centre-cropped to: those of a folder (224 by
            default), of torchvision's sets (by default 224 where they differ in size) or of a torch Dataset
            (unchanged by default).
        workers: processes that read images ahead; 0: threads of this process; None: $GAMBESON_WORKERS, or else by the
            number of cores, see :func:`gambeson.data.ahead.default_workers`.

    Raises:
        UserError: an unknown name, data that cannot be had or is not valid, or a size for tensors.
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers = {workers}: expected a number of processes, 0 or more")
    if isinstance(name_or_data, Path):
        return load_folder(name_or_data, size, workers)
    if not isinstance(name_or_data, str):
        return as_dataset(name_or_data, size=size, workers=workers)
    name, size = _sized(name_or_data, size)
    if name.startswith(FOLDER):
        return load_folder(Path(name.removeprefix(FOLDER)).expanduser(), size, workers)
    if name.startswith(TORCHVISION):
        return load_torchvision(name.removeprefix(TORCHVISION), data_root(root), size, workers)
    recipe = _recipe(name)
    if size is not None:
        raise UserError(
            f"size = {size} came with {recipe.name}, whose images are {recipe.shape[1]}x{recipe.shape[2]}: leave it out"
        )
    return build(recipe, *prepare(recipe, data_root(root)))


def get(name: str, root: str | Path | None = None) -> Path:
    """Fetch and prepare a named data set, unless it is there already; return the folder that holds it.

    Raises:
        UserError: an unknown name, or every way to it failed; the message lists them.
    """
    folder = data_root(root)
    if name.startswith(TORCHVISION):
        return fetch_torchvision(name.removeprefix(TORCHVISION), folder)
    prepare(_recipe(name), folder)
    return folder


def catalog(root: str | Path | None = None) -> list[Entry]:
    """List the named data sets; image-folder:PATH and torchvision:NAME come beside them."""
    folder = data_root(root)
    return [
        Entry(
            name=recipe.name,
            description=recipe.description,
            train=recipe.train,
            validation=recipe.validation,
            test=recipe.test,
            shape=recipe.shape,
            classes=recipe.num_classes,
            licence=recipe.licence,
            ready=stored_file(recipe.name, folder).is_file(),
            how=recipe.how,
        )
        for recipe in RECIPES.values()
    ]


def data_root(root: str | Path | None) -> Path:
    """Return the folder of downloads: the one given, else $GAMBESON_DATA, else ~/.cache/gambeson."""
    return Path(root or os.environ.get("GAMBESON_DATA") or "~/.cache/gambeson").expanduser()


def _sized(name: str, size: int | None) -> tuple[str, int | None]:
    """Split ``name?size=64`` into the name and the size."""
    bare, sign, number = name.rpartition("?size=")
    if not sign:
        return name, size
    if not number.isdecimal():
        raise UserError(f"{name} ends in size={number}: expected a number of pixels, for example {bare}?size=64")
    return bare, int(number)


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    raise unknown_name("data set", name, [*RECIPES, f"{FOLDER}PATH", f"{TORCHVISION}NAME"])
