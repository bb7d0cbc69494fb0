"""One crafting of a universal perturbation at work: its models, batches, starts and rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import Ascent
from gambeson.attacks.sources import Ensemble
from gambeson.base import UserError, derive, generator
from gambeson.data import Split, as_dataset
from gambeson.threat import Ball, BoxGradient
from gambeson.victim import Victim, predict, score


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One outcome that validation judges."""

    start: str
    """Where it comes from."""
    delta: torch.Tensor
    """(1, C, H, W), inside the ball."""
    rate: float | None = None
    """Its rate on validation, where the search has taken it already."""
    reached: bool = True
    """Whether the attack's own stopping rule was met."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """The models, images and ball of one crafting."""

    victims: list[Victim]
    train: Split
    """What is crafted on, on the models' device."""
    validation: Split
    ball: Ball
    seed: int
    target: int | None = None
    predicted_labels: bool = False
    box_gradient: BoxGradient = "exact"

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.victims[0].device

    @property
    def victim(self) -> Victim:
        """The one model, or the ensemble of several, whose losses are averaged."""
        return self.victims[0] if len(self.victims) == 1 else self._together

    @cached_property
    def _together(self) -> Ensemble:
        return Ensemble(self.victims, "losses")

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, C, H, W) of the perturbation."""
        return (1, *self.train.shape)

    def start(self, kind: str, restart: int, rows: int = 1) -> torch.Tensor:
        """Return ``rows`` starting points: ``zero``, or random ``sign``s on the ball's surface."""
        shape = (rows, *self.train.shape)
        if kind == "zero":
            return torch.zeros(shape, device=self.device)
        return self.ball.signs(shape, generator(self.seed, "start", restart, device=self.device))

    def starts(self, restarts: int, given: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the customary starts: zero, then random signs, then the one that was given."""
        for restart in range(restarts):
            kind = "sign" if restart else "zero"
            yield kind, self.start(kind, restart)
        if given is not None:
            yield "warm", given

    def stream(self, batch_size: int, restart: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, true labels) in whole epochs of a new order each, for as long as they are asked for."""
        size, epoch = min(batch_size, len(self.train)), 0
        seed = derive(self.seed, "batches", restart)
        while True:
            shuffle = generator(seed, "epoch", epoch)
            yield from self.train.batches(size, device=self.device, generator=shuffle, drop_last=True)
            epoch += 1

    def goals(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels to leave, or the targets to reach."""
        if self.target is not None:
            return torch.full_like(labels, self.target)
        if not self.predicted_labels:
            return labels
        with torch.no_grad():
            return torch.stack(self._together.each(images)).mean(0).argmax(1)

    def ascent(self, loss: Loss) -> Ascent:
        """Return the solver that climbs ``loss``, averaged over the models, from this ball."""
        return Ascent(
            victim=self.victim,
            ball=self.ball,
            loss=loss,
            box_gradient=self.box_gradient,
            ignore_index=self.train.ignore_index,
        )

    def rate(self, delta: torch.Tensor, split: Split | None = None) -> float:
        """Return the mean over the models of the error (or, targeted, of the share that says the target).

        Args:
            delta: (1, C, H, W).
            split: the images; validation where none are given.
        """
        split = self.validation if split is None else split
        rates = []
        for victim in self.victims:
            predictions = predict(victim, split, delta)
            if self.target is None:
                rates.append(score(predictions, split).error)
            else:
                rates.append(float((predictions == self.target).float().mean()))
        return sum(rates) / len(rates)

    def few(self, images: int) -> Split:
        """Return a random part of the training images, the same for every call."""
        return self.train.sample(images, seed=self.seed)


def splits_of(victim: Victim, data: object) -> tuple[Split, Split, int]:
    """Return train, validation and the number of classes of whatever a user has; test is not touched.

    Images alone (N, C, H, W) get the victim's predictions as labels; a fixed fifth of them is validation.
    """
    if not (isinstance(data, torch.Tensor | np.ndarray) and data.ndim == 4):
        dataset = as_dataset(data)
        return dataset.train, dataset.validation, dataset.num_classes
    images = torch.as_tensor(data)
    if len(images) < 2:
        raise UserError(f"{len(images)} images without labels came: expected 2 or more")
    bare = Split("images", images, torch.zeros(len(images), dtype=torch.int64), ("unknown",))
    labels = predict(victim, bare).to(images.device)
    with torch.no_grad():
        classes = victim(bare.take(slice(0, 1), victim.device)[0]).shape[1]
    whole = Split("images", images, labels, tuple(str(k) for k in range(classes)))
    held = whole.sample_indices(max(1, len(images) // 5))
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[held] = False
    return whole.subset(rest, "images/train"), whole.subset(held, "images/validation"), classes
