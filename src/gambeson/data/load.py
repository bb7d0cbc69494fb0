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

FOLDER = "image-folder:"


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


def load(name_or_data: Any, root: str | Path | None = None, *, size: int | None = None) -> Dataset:
    """Load a data set, fetching it first if need be.

    Args:
        name_or_data: digits, mnist5k, mnist, fashion-mnist, cifar10, cifar100 or image-folder:PATH; or an
            (images, labels) pair of tensors or arrays, a Split, or a torch Dataset of (image, label) items,
            which are cut 70/15/15.
        root: the folder of downloads; by default $GAMBESON_DATA or ~/.cache/gambeson.
        size: side in pixels of the square that images of a folder (224 by default) or of a torch Dataset
            (unchanged by default) are resized and centre-cropped to.

    Raises:
        UserError: an unknown name, data that cannot be had or is not valid, or a size for tensors.
    """
    if isinstance(name_or_data, Path):
        return load_folder(name_or_data, size)
    if not isinstance(name_or_data, str):
        return as_dataset(name_or_data, size=size)
    if name_or_data.startswith(FOLDER):
        return load_folder(Path(name_or_data.removeprefix(FOLDER)).expanduser(), size)
    recipe = _recipe(name_or_data)
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
    prepare(_recipe(name), folder)
    return folder


def catalog(root: str | Path | None = None) -> list[Entry]:
    """List the named data sets; image-folder:PATH comes beside them."""
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


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    raise unknown_name("data set", name, [*RECIPES, f"{FOLDER}PATH"])
