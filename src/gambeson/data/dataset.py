"""Data sets: train, validation and test splits, made from anything a user passes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gambeson.base.errors import DataWarning, UserError, unknown_name
from gambeson.data import lazy
from gambeson.data.lazy import LazySplit
from gambeson.data.partition import partition
from gambeson.data.pictures import Decoder
from gambeson.data.split import Split, SplitT
from gambeson.data.torch_dataset import from_items
from gambeson.tasks.labels import as_pair, distinct, find_ignored

PARTS = ("train", "validation", "test")
Part = Literal["train", "validation", "test"]
SHARED = 0.05
"""Largest share of equal images, of the smaller split, that counts as chance (ours): real data sets contain a few
images in both train and test, far fewer than this; a split that was passed twice shares nearly all."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Three splits: train to learn and craft on, validation to select on, test to report on.

    Raises:
        UserError: a split is empty or holds one class only, or the splits differ in shape or classes.
    """

    name: str
    """Name of the data set in reports."""
    train: Split
    """For training models and crafting universal perturbations."""
    validation: Split
    """For selecting checkpoints and restarts."""
    test: Split
    """For reported numbers; nothing is ever selected on it."""
    classes: tuple[str, ...]
    """The class names, in the order of the labels."""

    def __post_init__(self) -> None:
        for part in PARTS:
            split: Split = getattr(self, part)
            if len(split) == 0:
                raise UserError(
                    f"{split.name}, the {part} split of {self.name}, is empty: expected images of two classes"
                )
            if split.classes != self.classes:
                raise UserError(
                    f"{split.name} has {len(split.classes)} classes, but {self.name} has {len(self.classes)}: give "
                    "every split the same class names in the same order"
                )
            if split.shape != self.train.shape:
                raise UserError(
                    f"{split.name} holds images of {split.shape}, but train of {self.train.shape}: expected one shape"
                )
            unlabelled = split.unlabelled
            if 0 < unlabelled == len(split):
                raise UserError(
                    f"{split.name}, the {part} split of {self.name}, has no label that counts: all {len(split)} images "
                    f"have the ignore index {split.ignore_index} everywhere; give images with labels"
                )
            if split.single_class:
                raise UserError(
                    f"{split.name}, the {part} split of {self.name}, has {len(split)} images of one class only: "
                    "expected two classes or more; give more images, or build the three splits yourself"
                )
            if unlabelled:
                warnings.warn(
                    f"{unlabelled} of the {len(split)} images of {split.name} have no label that counts (all are "
                    f"{split.ignore_index}): they are in no rate, so remove them",
                    DataWarning,
                    stacklevel=3,
                )

    def __repr__(self) -> str:
        counts = ", ".join(f"{part} {len(getattr(self, part)):,}" for part in PARTS)
        some = ", ".join([*self.classes[:5], *(["..."] if self.num_classes > 5 else [])])
        shape = "x".join(map(str, self.train.shape))
        return f"Dataset({self.name}: {counts} images of {shape}, {self.num_classes} classes: {some})"

    @property
    def signs(self) -> dict[str, str]:
        """:attr:`Split.sign` of every part."""
        return {part: getattr(self, part).sign for part in PARTS}

    @property
    def in_channels(self) -> int:
        """Channels of one image."""
        return self.train.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of one image."""
        return self.train.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignore index."""
        return len(self.classes)


def as_split(data: Any, part: Part = "test") -> Split:
    """Return one split of anything a user passes.

    Args:
        data: a Dataset (its ``part``), a Split (itself), an (images, labels) pair or a torch Dataset (all).
        part: which split of a Dataset.

    Raises:
        UserError: something else, an unknown part, or a pair without images.
    """
    if part not in PARTS:
        raise unknown_name("part", part, PARTS)
    if isinstance(data, Dataset):
        return getattr(data, part)
    return _whole(data, "data")


def as_dataset(data: Any, decode: Decoder | None = None, workers: int | None = None) -> Dataset:
    """Return a Dataset from anything a user passes, cut 70/15/15 (stratified, deterministic) unless it is one.

    Args:
        data: a Dataset (itself), a Split, an (images, labels) pair, or a torch Dataset.
        decode: how a torch Dataset's images are read; None: in their own size and mode.
        workers: processes that prefetch a torch Dataset's items, see :class:`LazySplit`.

    Raises:
        UserError: another type, or too little data for three splits with two classes each.
    """
    if isinstance(data, Dataset):
        return data
    whole = _whole(data, "data", decode, workers)
    return cut(whole, whole.name, (0.15, 0.15))


def cut(whole: Split, name: str, shares: Sequence[float]) -> Dataset:
    """Cut one split into a Dataset; ``shares`` are those of validation and test."""
    counts = [max(2, round(len(whole) * share)) for share in shares]
    if sum(counts) >= len(whole):
        raise UserError(f"{name} has {len(whole)} images, too few for train, validation and test: give 7 or more")
    parts = partition(_labels(whole), counts, name)
    train, validation, test = (whole.subset(index, f"{name}/{part}") for part, index in zip(PARTS, parts, strict=True))
    return Dataset(name, train, validation, test, whole.classes)


def complete(splits: dict[str, Split], name: str, share: float, most: int | None = None) -> Dataset:
    """Return a Dataset of the given splits; missing ones are cut from train, stratified and deterministic.

    Args:
        splits: by part, including train; or everything under the name "", which is cut into all three.
        name: of the data set.
        share: of train's images, for each missing part.
        most: maximum number of images of a missing part.

    Raises:
        UserError: too few images to cut from.
    """
    if "" in splits:
        return cut(splits[""], name, (share, share))
    train = splits["train"]
    missing = [part for part in PARTS if part not in splits]
    count = max(2, round(len(train) * share))
    counts = [count if most is None else min(most, count) for _ in missing]
    if sum(counts) >= len(train):
        raise UserError(f"{train.name} has {len(train)} images, too few to cut {' and '.join(missing)} from: add more")
    rest, *parts = partition(_labels(train), counts, name)
    found = {part: train.subset(index, f"{name}/{part}") for part, index in zip(missing, parts, strict=True)}
    found = {**splits, **found, "train": train.subset(rest, f"{name}/train")}
    return Dataset(name, found["train"], found["validation"], found["test"], train.classes)


def settled(data: Dataset) -> Dataset:
    """Read every split into memory if together they fit within :data:`MEMORY_LIMIT`."""
    splits = [getattr(data, part) for part in PARTS]
    lazies = [split for split in splits if isinstance(split, LazySplit)]
    if sum(split.nbytes for split in lazies) > lazy.MEMORY_LIMIT:
        return data
    train, validation, test = (split.eager() if isinstance(split, LazySplit) else split for split in splits)
    return Dataset(data.name, train, validation, test, data.classes)


def held_out(split: SplitT, seen: torch.Tensor, those: str, remedy: str) -> SplitT:
    """Return the split without the images that have been seen, so that rates over it are on unseen images.

    Images are compared by content (:func:`gambeson.data.split.image_hashes`), and duplicates count once. Up to
    :data:`SHARED` of the smaller split are left out; more is an error.

    Args:
        split: the images to score.
        seen: hashes of the seen images.
        those: their name in the message, after their number.
        remedy: advice in the message.

    Raises:
        UserError: more images are shared than that; the message has their number.
    """
    own, seen = split.image_hashes.unique(), seen.cpu().unique()
    shared = int(torch.isin(own, seen).sum())
    if shared > SHARED * min(len(own), len(seen)):
        raise UserError(
            f"{shared} of the {len(seen)} {those} are among the {len(own)} to be scored ({split.name}): {remedy}"
        )
    return split.without(seen) if shared else split


def disjoint(data: Dataset) -> Dataset:
    """Return the data set without validation images that are in train, and test images that are in either.

    Returns the same object if its splits share nothing. Every image is read once.

    Raises:
        UserError: two splits share more than :data:`SHARED` of the smaller one's images, see :func:`held_out`.
    """
    remedy = "give three splits that share no image, or one that is cut into three"
    train = data.train.image_hashes
    validation = held_out(data.validation, train, f"images of {data.train.name}", remedy)
    test = held_out(data.test, train, f"images of {data.train.name}", remedy)
    test = held_out(test, data.validation.image_hashes, f"images of {data.validation.name}", remedy)
    if validation is data.validation and test is data.test:
        return data
    return Dataset(data.name, data.train, validation, test, data.classes)


def from_pair(images: Any, labels: Any, name: str) -> Split:
    """Build a split from a pair, with numbered classes and the usual ignore index of label maps."""
    images, labels, task = as_pair(images, labels)
    if len(images) == 0:
        raise UserError("the pair (images, labels) is empty: expected one image at the least")
    ignored = None if task.per_image_label else find_ignored(distinct(labels))
    return Split(name, images, labels, None, ignored)


def is_pair(data: Any) -> bool:
    """Tell whether ``data`` is (images, labels)."""
    return isinstance(data, tuple | list) and len(data) == 2


def _labels(split: Split) -> torch.Tensor:
    # Lazy maps are on disk, and maps are not stratified: any labels of the right length will do.
    return torch.zeros(len(split), 1, 1) if isinstance(split, LazySplit) and split.maps else split.labels


def _whole(data: Any, name: str, decode: Decoder | None = None, workers: int | None = None) -> Split:
    if decode is not None and (isinstance(data, Split) or is_pair(data)):
        raise UserError("size and mode are for image folders and torch Datasets: leave them out with tensors")
    if isinstance(data, Split):
        return data
    if is_pair(data):
        return from_pair(data[0], data[1], name)
    if isinstance(data, torch.utils.data.Dataset):
        return from_items(data, decode or Decoder(), name, workers)
    raise UserError(
        f"data is a {type(data).__name__}: expected a Dataset, a Split, a pair (images, labels) of tensors or arrays, "
        "or a torch.utils.data.Dataset; named sets come from gambeson.data.load"
    )
