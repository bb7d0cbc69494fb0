"""From a recipe to tensors on disk, and from those to a Dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gambeson.base.checks import check_labels
from gambeson.base.errors import OutOfSpace, UserError
from gambeson.base.tensors import load_tensors, save_tensors
from gambeson.data.dataset import Dataset
from gambeson.data.partition import partition
from gambeson.data.registry import Recipe
from gambeson.data.split import Split

Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]


def stored_file(name: str, root: Path) -> Path:
    """Return where the prepared tensors of a data set stand."""
    return root / f"{name}.safetensors"


def prepare(recipe: Recipe, root: Path) -> Stored:
    """Return a data set's tensors and what is known about them, from disk or by the first way that works.

    Raises:
        UserError: every way failed, or the result cannot be stored.
    """
    file = stored_file(recipe.name, root)
    if file.is_file():
        try:
            tensors, about = load_tensors(file, "images and labels")
            check_content(recipe, tensors)
            return tensors, about
        except UserError:
            pass  # damaged, or of another make: prepared again and replaced
    failures: list[str] = []
    for way in recipe.ways:
        try:
            content = way.run(root)
            check_content(recipe, content.tensors)
        except UserError as error:
            failures.append(f"({len(failures) + 1}) {way.name}: {error}")
            continue
        about = {
            "name": recipe.name,
            "source": way.name,
            "licence": recipe.licence,
            "classes": content.classes,
        }
        try:
            save_tensors(file, content.tensors, about)
        except OutOfSpace as error:
            raise OutOfSpace(
                f"could not store {file} ({error.__cause__}): nothing half-written was left; free some "
                "space, or choose "
                "another folder with root= or $GAMBESON_DATA"
            ) from error
        return content.tensors, about
    raise UserError(
        f"could not get {recipe.name}, every way failed: {'; '.join(failures)}. Connect to the network "
        "and run "
        f"`gambeson data get {recipe.name}` again, or copy {file.name} from another machine to {root}"
    )


def check_content(recipe: Recipe, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that are not the data set: names, counts, shape, types and labels.

    Raises:
        UserError: the first thing that differs.
    """
    parts = ("train_", "test_") if recipe.source[1] else ("",)
    for part, count in zip(parts, recipe.source, strict=False):
        images, labels = tensors.get(f"{part}images"), tensors.get(f"{part}labels")
        if images is None or labels is None:
            raise UserError(f"{part}images or {part}labels are missing: expected both")
        if images.dtype != torch.uint8 or tuple(images.shape) != (count, *recipe.shape):
            raise UserError(
                f"{part}images are {images.dtype} of {tuple(images.shape)}: expected uint8 of {(count, *recipe.shape)}"
            )
        if tuple(labels.shape) != (count,):
            raise UserError(f"{part}labels have shape {tuple(labels.shape)}: expected {(count,)}")
        check_labels(labels, recipe.num_classes)


def build(recipe: Recipe, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Dataset:
    """Cut a prepared data set into its splits, the same way on every machine."""
    name = recipe.name
    given = recipe.classes or about.get("classes") or ()
    classes = tuple(given) if len(given) == recipe.num_classes else tuple(map(str, range(recipe.num_classes)))
    if recipe.source[1]:
        whole = Split(name, tensors["train_images"], tensors["train_labels"], classes)
        train, validation = partition(whole.labels, [recipe.validation], name)
        test = Split(f"{name}/test", tensors["test_images"], tensors["test_labels"], classes)
    else:
        whole = Split(name, tensors["images"], tensors["labels"], classes)
        train, validation, chosen = partition(whole.labels, [recipe.validation, recipe.test], name)
        test = whole.subset(chosen, f"{name}/test")
    return Dataset(
        name,
        whole.subset(train, f"{name}/train"),
        whole.subset(validation, f"{name}/validation"),
        test,
        classes,
    )
