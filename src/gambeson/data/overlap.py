"""Images that stand on both sides of a split: left out where they are few, refused where they are many."""

from __future__ import annotations

import torch

from gambeson.base.errors import UserError
from gambeson.data.dataset import Dataset
from gambeson.data.split import SplitT

SHARED = 0.05
"""Largest share of equal images, of the smaller side, that may be chance. Ours: real data sets hold the same picture
in train and test now and then, by far less than this; a split that was given twice shares nearly all."""


def held_out(split: SplitT, seen: torch.Tensor, those: str, remedy: str) -> SplitT:
    """Return the split without the images that have been seen, so that a rate over it is one over unseen images.

    Images are compared by their content (:func:`gambeson.data.split.image_hashes`), and counted once however often
    they occur. Up to :data:`SHARED` of the smaller side they are left out; more are a mistake.

    Args:
        split: the images to score.
        seen: hashes of the images that were seen.
        those: what the message calls them, after their number.
        remedy: what the message advises.

    Raises:
        UserError: more images are shared than chance explains; the message has their number.
    """
    own, seen = split.image_hashes.unique(), seen.cpu().unique()
    shared = int(torch.isin(own, seen).sum())
    if shared > SHARED * min(len(own), len(seen)):
        raise UserError(
            f"{shared} of the {len(seen)} {those} are among the {len(own)} to be scored ({split.name}): {remedy}"
        )
    return split.without(seen) if shared else split


def disjoint(data: Dataset) -> Dataset:
    """Return the data set with the validation images that are not in train, and the test images that are in neither.

    The data set itself where its splits share nothing. Every image is read once.

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
