"""The batches of an epoch: which images a process takes at a step, in whose order, and which draws they get."""

from __future__ import annotations

import torch

from gambeson.base import derive, generator, place
from gambeson.data import Split, augment
from gambeson.defenses import Batch
from gambeson.training.recipe import Recipe


def member_seeds(seed: int, members: int) -> list[int]:
    """Seed of each member: what a run of that member alone would be given."""
    return [seed] if members == 1 else [derive(seed, "member", number) for number in range(members)]


class Epoch:
    """The batches of one epoch, by number; the last, smaller one is left out.

    Args:
        train: the images.
        recipe: batch size and augmentation.
        orders: of the data; their rows follow each other in a batch.
        seed: of the run.
        epoch: its number.
        device: where the batches go.
    """

    def __init__(self, train: Split, recipe: Recipe, orders: int, seed: int, epoch: int, device: torch.device) -> None:
        self.train, self.recipe, self.seed, self.epoch, self.device = train, recipe, seed, epoch, device
        self.orders = [
            torch.randperm(len(train), generator=generator(one, "order", epoch)) for one in member_seeds(seed, orders)
        ]
        self.place = place()
        self.share = recipe.batch_size // self.place[1]

    def __len__(self) -> int:
        return len(self.train) // self.recipe.batch_size

    def __getitem__(self, k: int) -> Batch:
        # A process takes consecutive rows, so that a heap never crosses processes.
        first = k * self.recipe.batch_size + self.place[0] * self.share
        indices = torch.cat([order[first : first + self.share] for order in self.orders])
        images, labels = self.train.take(indices, self.device)
        step = self.epoch * len(self) + k
        seed, whole = derive(self.seed, "step", step), self.recipe.augment == "none"
        if not whole:
            draw = generator(seed, "augment", self.place[0], device=self.device)
            if labels.ndim == 1:
                images = augment(images, self.recipe.augment, draw)
            else:
                images, labels = augment(images, self.recipe.augment, draw, labels, self.train.ignore_index)
        return Batch(
            images=images,
            labels=labels,
            seed=seed,
            ignore_index=self.train.ignore_index,
            place=self.place,
            step=step,
            steps=len(self),
            epochs=self.recipe.epochs,
            indices=indices if whole else None,
        )
