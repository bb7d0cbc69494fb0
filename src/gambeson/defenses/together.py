"""Ensembles whose members learn together: all see the same images, and a term compares their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import cross_entropy
from gambeson.base import UserError
from gambeson.defenses.diversity import check_labels
from gambeson.defenses.member_steps import watch
from gambeson.defenses.objective import Losses, Objective, Scene
from gambeson.defenses.terms import Batch
from gambeson.defenses.voters import Voting, members_of
from gambeson.models import PixelModel

Compare = Callable[[PixelModel, torch.Tensor, Batch], dict[str, tuple[float, torch.Tensor]]]
"""Weighted values by name, from the model, the members' logits (M, N, K) and the batch."""


class Together(Voting):
    """Base of ADP, GAL and TRS: one data order for all members, so that a batch has N rows and not M * N."""

    members: Annotated[int, Field(ge=2)] = 3
    """Members; 3 in the public scripts."""
    watched: Annotated[int, Field(ge=0)] = 32
    """Images on which the members' diversity gain is taken and logged, once an epoch; 0: never."""

    @property
    def num_orders(self) -> int:
        """Data orders: all members see the same images."""
        return 1

    def _open(self, scene: Scene, compare: Compare, *, mean: bool = False, slopes: bool = False) -> Objective:
        members_of(scene.model, self.members)
        assert isinstance(scene.model, PixelModel)
        check_labels(scene.train.labels, type(self).__name__)
        return Compared(scene.model, compare, mean=mean, slopes=slopes, watched=self.watched)


class Compared(Objective):
    """The members' cross-entropies, and what compares them, from one forward of each.

    Args:
        model: the ensemble.
        compare: the other values.
        mean: the mean of the cross-entropies in place of their sum.
        slopes: whether the images need a gradient.
        watched: images of a batch on which the diversity gain is taken, at the last step of an epoch.
    """

    def __init__(
        self, model: PixelModel, compare: Compare, *, mean: bool = False, slopes: bool = False, watched: int = 0
    ) -> None:
        super().__init__({})
        self._voters = model.voters  # a list: the model is no part of the objective's state
        self._compare, self._mean, self._slopes, self._watched = compare, mean, slopes, watched

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; a value of weight zero is left out."""
        images = batch.images.detach().requires_grad_() if self._slopes else batch.images
        logits = torch.stack([voter(images) for voter in self._voters])
        every = torch.stack([cross_entropy(z, batch.labels, batch.ignore_index).mean() for z in logits])
        assert isinstance(model, PixelModel)
        values = self._compare(model, logits, dataclasses.replace(batch, images=images))
        total = every.mean() if self._mean else every.sum()
        total = torch.stack([total, *(weight * value for weight, value in values.values())]).sum()
        named = {name: value.detach() for name, (_, value) in values.items()}
        return {"loss": total, "clean": every.mean().detach()} | named | watch(self._voters, batch, self._watched)


def check_classes(members: int, classes: int) -> None:
    """Refuse more members than there are wrong classes.

    Raises:
        UserError: the predictions cannot all be orthogonal.
    """
    if members > classes - 1:
        raise UserError(
            f"{members} members cannot differ on {classes} classes: their predictions of the wrong classes can be "
            f"orthogonal for {classes - 1} at most; choose fewer members"
        )
