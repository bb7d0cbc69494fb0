"""Images shared between splits: left out if few, refused if many."""

from __future__ import annotations

import torch

from gambeson.base.errors import UserError
from gambeson.data.dataset import Dataset
from gambeson.data.split import SplitT

SHARED = 0.05
"""Largest share of equal images, of the smaller split, that counts as chance (ours): real data sets contain a few
images in both train and test, far fewer than this; a split that was passed twice shares nearly all."""


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
