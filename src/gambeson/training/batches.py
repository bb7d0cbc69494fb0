"""The batches of an epoch: order, share of each process, and augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gambeson.base import derive, generator, place
from gambeson.data import Split, augment
from gambeson.defenses import Batch
from gambeson.training.recipe import Recipe


def member_seeds(seed: int, members: int) -> list[int]:
    """Seed of each member, which is that of a run of the member alone."""
    return [seed] if members == 1 else [derive(seed, "member", number) for number in range(members)]


class Epoch:
    """The batches of one epoch by number, without a smaller last one.

    Args:
        train: the images.
        recipe: batch size and augmentation.
        orders: number of data orders, whose rows are concatenated in a batch.
        seed: of the run.
        epoch: its number.
        device: of the batches.
    """

    def __init__(self, train: Split, recipe: Recipe, orders: int, seed: int, epoch: int, device: torch.device) -> None:
        self.train, self.recipe, self.seed, self.epoch, self.device = train, recipe, seed, epoch, device
        self.seeds = member_seeds(seed, orders)
        self.orders = [torch.randperm(len(train), generator=generator(one, "order", epoch)) for one in self.seeds]
        self.place = place()
        self.share = recipe.batch_size // self.place[1]

    def __len__(self) -> int:
        return len(self.train) // self.recipe.batch_size

    def __getitem__(self, k: int) -> Batch:
        return self._batch(k, *self.train.take(self._rows(k), self.device))

    def walk(self, first: int = 0) -> Iterator[Batch]:
        """The batches from number ``first`` on; images that are not in memory are prefetched."""
        steps = range(first, len(self))
        for k, taken in zip(steps, self.train.walk(map(self._rows, steps), self.device), strict=True):
            yield self._batch(k, *taken)

    def _rows(self, k: int) -> torch.Tensor:
        # A process takes consecutive rows, so that a heap never crosses processes.
        first = k * self.recipe.batch_size + self.place[0] * self.share
        return torch.cat([order[first : first + self.share] for order in self.orders])

    def _batch(self, k: int, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        step = self.epoch * len(self) + k
        seed, whole = derive(self.seed, "step", step), self.recipe.augment == "none"
        if not whole:
            images, labels = self._augmented(images, labels, step)
        return Batch(
            images=images,
            labels=labels,
            seed=seed,
            task=self.train.task,
            place=self.place,
            step=step,
            steps=len(self),
            epochs=self.recipe.epochs,
            indices=self._rows(k) if whole else None,
        )

    def _augmented(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment the rows of every order with the draws of a separate run."""
        moved, kept = [], []
        for part, theirs, seed in zip(images.split(self.share), labels.split(self.share), self.seeds, strict=True):
            draw = generator(derive(seed, "step", step), "augment", self.place[0], device=self.device)
            if self.train.task.per_image_label:
                moved.append(augment(part, self.recipe.augment, draw))
                kept.append(theirs)
            else:
                both = augment(part, self.recipe.augment, draw, theirs, self.train.ignore_index)
                moved.append(both[0])
                kept.append(both[1])
        return (moved[0], kept[0]) if len(moved) == 1 else (torch.cat(moved), torch.cat(kept))
