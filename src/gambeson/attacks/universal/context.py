"""The context of a crafting: models, batches, starts, targets and rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.target import OMEGA, Target, weights
from gambeson.base import UserError, derive, generator
from gambeson.data import Split, as_dataset
from gambeson.tasks import Task, answers
from gambeson.threat import Ball, BoxGradient
from gambeson.threat.edits import Edit
from gambeson.victim import (
    ABSTAIN,
    EOT_SAMPLES,
    EditedVictim,
    ModelAverage,
    Shared,
    Victim,
    auto_batch_size,
    predict,
    score,
)


@dataclass(frozen=True, kw_only=True)
class CraftingContext:
    """The models, images and ball of one crafting."""

    victims: list[Victim]
    train: Split
    """Training images, on the models' device."""
    validation: Split
    ball: Ball
    seed: int
    target: Target | None = None
    """The target, with its index or map."""
    omega: float = OMEGA
    """Weight of the pixels to hide."""
    predicted_labels: bool = False
    box_gradient: BoxGradient = "exact"
    eot_samples: int | None = None
    """See :attr:`gambeson.attacks.UniversalAttack.eot_samples`."""
    edits: tuple[Edit, ...] = ()
    """See :attr:`gambeson.attacks.UniversalAttack.edits`."""
    before: tuple[int, int] = (0, 0)
    """Forwards and backwards of the models before the crafting, in images."""
    _reached: dict[int, tuple[Split, torch.Tensor, torch.Tensor | None]] = field(init=False, default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.victims[0].device

    @property
    def victim(self) -> Victim:
        """The model, or the ensemble of several, whose losses are averaged."""
        return self.victims[0] if len(self.victims) == 1 else self._together

    @cached_property
    def edited(self) -> list[Victim]:
        """The models behind the edits, which attacks take gradients of; :attr:`victims` where there are none."""
        if not self.edits:
            return self.victims
        draws = [generator(self.seed, "edits", k) for k in range(len(self.victims))]
        return [EditedVictim(victim, self.edits, draw) for victim, draw in zip(self.victims, draws, strict=True)]

    @cached_property
    def averaged(self) -> Victim:
        """The victim of the gradients: :attr:`victim`, or the EOT average of each model that is random or edited."""
        return self._averaged(self.edited)

    @cached_property
    def _unedited(self) -> Victim:
        return self._averaged(self.victims)

    def _averaged(self, models: list[Victim]) -> Victim:
        drawn = [victim for victim in models for _ in range(self._draws(victim))]
        if len(drawn) == 1:
            return drawn[0]
        return self._together if drawn == self.victims else ModelAverage(drawn, "losses")

    def _draws(self, victim: Victim) -> int:
        traits = victim.traits
        if traits is None or not traits.stochastic:
            return self.eot_samples or 1 if isinstance(victim, EditedVictim) else 1
        # With independent draws per image, the mean gradient of a batch already averages over draws.
        return self.eot_samples or (EOT_SAMPLES if traits.shared else 1)

    @cached_property
    def _together(self) -> ModelAverage:
        return ModelAverage(self.victims, "losses")

    @property
    def task(self) -> Task:
        """What the labels mean."""
        return self.train.task

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, C, H, W) of the perturbation."""
        return (1, *self.train.shape)

    def start(self, kind: str, restart: int, rows: int = 1) -> torch.Tensor:
        """Return ``rows`` starting points: ``zero``, or random ``sign``s on the ball's surface."""
        shape = (rows, *self.shape[1:])
        if kind == "zero":
            return torch.zeros(shape, device=self.device)
        return self.ball.signs(shape, generator(self.seed, "start", restart, device=self.device))

    def starts(self, restarts: int, given: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the starts: zero, then random signs, then the given one."""
        for restart in range(restarts):
            kind = "sign" if restart else "zero"
            yield kind, self.start(kind, restart)
        if given is not None:
            yield "warm", given

    def stream(self, batch_size: int, restart: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, true labels) without end; see :meth:`batches`."""
        for images, labels, _ in self.batches(batch_size, restart):
            yield images, labels

    def batches(self, batch_size: int, restart: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (images, true labels, their places in ``train``) without end, in whole epochs with a new order each.

        Images without a label that counts, or without a target, are left out, so that batch means include only images
        with one.

        Raises:
            UserError: no image has a label that counts.
        """
        size, epoch = max(1, min(batch_size, len(self.train))), 0
        seed = derive(self.seed, "batches", restart)
        while True:
            order, none = torch.randperm(len(self.train), generator=generator(seed, "epoch", epoch)), True
            parts = order[: len(order) - len(order) % size].split(size)
            for (images, labels), rows in zip(self.train.walk(parts, self.device), parts, strict=True):
                if not self.task.all_count or self.hides:  # else no batch has to be looked at
                    kept = self.task.labelled(labels)
                    if self.hides:
                        kept &= self.task.units(self.reach(self.train, rows)[0] >= 0).any(1).to(kept.device)
                    images, labels, rows = images[kept], labels[kept], rows[kept.cpu()]
                if len(images):
                    none = False
                    yield images, labels, rows
            if none:
                raise UserError(
                    f"no image of {self.train.name} has a label that counts (all are the ignore index "
                    f"{self.train.ignore_index}): give labels, or images alone"
                )
            epoch += 1

    @property
    def left_out(self) -> int:
        """Training images without a target, which are wholly of the class to hide."""
        if not self.hides:
            return 0
        targets, labelled = self.reach(self.train)[0], self.task.labelled(self.train.labels.cpu())
        return int((labelled & ~self.task.units(targets >= 0).any(1)).sum())

    @property
    def hides(self) -> bool:
        """Whether a class is to be hidden, so that each image has targets of its own."""
        return self.target is not None and self.target.kind == "hide"

    def reach(self, split: Split, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the targets of images of a split, and which units are to be hidden, as :meth:`Target.reach` does.

        Both are on the CPU. A class to hide is looked for once, in the clean predictions, one forward per image, or in
        the true labels.
        """
        assert self.target is not None
        if id(split) not in self._reached:
            labels = split.labels.cpu()
            made_of = self.predictions(split) if self.hides and self.predicted_labels else labels
            targets, hidden = self.target.reach(made_of, split.task.valid(labels))
            self._reached[id(split)] = split, targets.short() if self.hides else targets, hidden
        _, targets, hidden = self._reached[id(split)]
        return (targets, hidden) if rows is None else (targets[rows], None if hidden is None else hidden[rows])

    def predictions(self, split: Split) -> torch.Tensor:
        """Return the clean predictions of a split, on the CPU; of several models those of their mean logits.

        Those of images without edits, as everywhere where labels are predictions.
        """
        if len(self.victims) == 1:
            return predict(self.victim, split, seed=self.seed)
        parts = split.batches(auto_batch_size(split.shape), device=self.device)
        return torch.cat([self._predicted(images).cpu() for images, _ in parts])

    def _predicted(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            victim = self._unedited
            each = victim.each(images) if isinstance(victim, ModelAverage) else [victim(images)]
            return answers(torch.stack(list(each)).mean(0))

    def targets(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels to leave, or the targets to reach; ignored where the true label is.

        Raises:
            UserError: some pixels have a weight of their own; :meth:`aims` returns it.
        """
        if self._weighted:
            raise UserError(f"target {self.target}: this attack weighs all pixels equally; choose stochastic-pgd")
        if self._map is not None:
            targets = self._map.expand_as(labels)
        elif self.target is not None:
            targets = torch.full_like(labels, self.target.index)
        elif not self.predicted_labels:
            return labels
        else:
            targets = self._predicted(images)
        return self.task.targets(targets, labels)

    def aims(
        self, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return :meth:`targets` of any kind, and their weights in the loss, None where all are 1.

        Args:
            images: (N, C, H, W).
            labels: their true labels.
            rows: their places in ``train``, as :meth:`batches` yields them.
        """
        if not self._weighted:
            return self.targets(images, labels), None
        targets, hidden = self.reach(self.train, rows)
        targets, hidden = targets.to(labels), None if hidden is None else hidden.to(labels.device)
        return self.task.targets(targets.clamp(min=0), labels), weights(targets, hidden, self.omega)

    @cached_property
    def _map(self) -> torch.Tensor | None:
        found = None if self.target is None else self.target.map
        return None if found is None else found.to(self.device)

    @cached_property
    def _weighted(self) -> bool:
        """Whether the pixels have weights: with a class to hide, or where the map of a static target has holes."""
        return self.hides or (self._map is not None and bool((self._map < 0).any()))

    def solver(self, loss: Loss) -> ProjectedGradient:
        """Return the solver for ``loss``, averaged over the models, in this ball."""
        return ProjectedGradient(
            victim=self.averaged,
            ball=self.ball,
            loss=loss,
            box_gradient=self.box_gradient,
            task=self.task,
        )

    def rate(self, delta: torch.Tensor, split: Split | None = None) -> float:
        """Return the error (or, targeted, the rate of :meth:`Target.rate`), averaged over the models and the edits.

        Args:
            delta: (1, C, H, W).
            split: the images; by default validation.
        """
        split = self.validation if split is None else split
        rates = []
        for predictions in chain.from_iterable(self.under_edits(victim, split, delta) for victim in self.victims):
            if self.target is None:
                rates.append(score(predictions, split).error)
            else:
                rates.append(self.target.rate(predictions, *self.reach(split)))
        return sum(rates) / len(rates)

    def under_edits(self, victim: Victim, split: Split, delta: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the predictions of a split under a perturbation and each of the edits, or none where there are none."""
        for edit in self.edits or (None,):
            yield predict(victim, split, self.carried(delta), seed=self.seed, edit=edit)

    def carried(self, delta: torch.Tensor) -> Shared:
        """Return what images share where they are scored: the perturbation itself."""
        return delta

    def few(self, images: int) -> Split:
        """Return a random part of the training images, the same for every call."""
        return self.train.sample(images, seed=self.seed)


def splits_of(victim: Victim, data: object) -> tuple[Split, Split]:
    """Return train and validation of anything a user passes; test is not read.

    Images without labels (N, C, H, W) get the victim's predictions; a fixed fifth of them is validation. Images on
    which a random model's votes have no majority are left out; such pixels of label maps do not count.

    Raises:
        UserError: fewer than 2 images with a prediction.
    """
    if not (isinstance(data, torch.Tensor | np.ndarray) and data.ndim == 4):
        dataset = as_dataset(data)
        return dataset.train, dataset.validation
    images = torch.as_tensor(data)
    if len(images) < 2:
        raise UserError(f"got {len(images)} images without labels: expected 2 or more")
    bare = Split("images", images, torch.zeros(len(images), dtype=torch.int64), ("unknown",))
    labels = predict(victim, bare).to(images.device)
    sure = (labels != ABSTAIN).view(len(labels), -1).any(1)
    if int(sure.sum()) < 2:
        raise UserError(
            f"the random model's votes have a majority on {int(sure.sum())} of {len(images)} images without labels: "
            "expected 2 or more; give labels as well"
        )
    if not bool(sure.all()):
        images, labels = images[sure], labels[sure]
    classes = victim.inspect(bare.take(slice(0, 8), victim.device)[0], scores=True).shape[1]
    ignored = ABSTAIN if bool((labels == ABSTAIN).any()) else None
    whole = Split("images", images, labels, tuple(str(k) for k in range(classes)), ignore_index=ignored)
    held = whole.sample_indices(max(1, len(images) // 5))
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[held] = False
    return whole.subset(rest, "images/train"), whole.subset(held, "images/validation")


def passes(victims: list[Victim]) -> tuple[int, int]:
    """Return the forwards and backwards of the victims so far, in images; a victim listed twice counts once."""
    unique = {id(victim): victim for victim in victims}.values()
    return sum(victim.forwards for victim in unique), sum(victim.backwards for victim in unique)
