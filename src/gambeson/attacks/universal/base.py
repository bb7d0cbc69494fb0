"""Base class of universal attacks, and the context of a crafting: models, batches, starts and rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from gambeson.attacks.losses import Loss
from gambeson.attacks.registry import ATTACKS
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.perturbation import Provenance, Status, UniversalPerturbation
from gambeson.base import Config, UserError, derive, generator, seeded
from gambeson.data import Split, as_dataset, held_out
from gambeson.models import fingerprint
from gambeson.tasks import Task
from gambeson.threat import Ball, BoxGradient, Eps, Norm
from gambeson.victim import EOT_SAMPLES, ModelAverage, Source, Victim, as_victim, predict, rescaled, score


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate perturbation, for validation to select from."""

    start: str
    """Its origin."""
    delta: torch.Tensor
    """(1, C, H, W), inside the ball."""
    rate: float | None = None
    """Its rate on validation, if the search has computed it."""
    reached: bool = True
    """Whether the attack's own stopping rule was met."""


@dataclass(frozen=True, kw_only=True)
class CraftingContext:
    """The models, images and ball of one crafting."""

    victims: list[Victim]
    train: Split
    """Training images, on the models' device."""
    validation: Split
    ball: Ball
    seed: int
    target: int | None = None
    predicted_labels: bool = False
    box_gradient: BoxGradient = "exact"
    eot_samples: int | None = None
    """See :attr:`gambeson.attacks.UniversalAttack.eot_samples`."""
    before: tuple[int, int] = (0, 0)
    """Forwards and backwards of the models before the crafting, in images."""

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.victims[0].device

    @property
    def victim(self) -> Victim:
        """The model, or the ensemble of several, whose losses are averaged."""
        return self.victims[0] if len(self.victims) == 1 else self._together

    @cached_property
    def averaged(self) -> Victim:
        """The victim of the gradients: :attr:`victim`, or the EOT average of each random model."""
        drawn = [victim for victim in self.victims for _ in range(self._draws(victim))]
        return self.victim if len(drawn) == len(self.victims) else ModelAverage(drawn, "losses")

    def _draws(self, victim: Victim) -> int:
        traits = victim.traits
        if traits is None or not traits.stochastic:
            return 1
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
        shape = (rows, *self.train.shape)
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
        """Yield (images, true labels) without end, in whole epochs with a new order each.

        Images without a label that counts are left out, so that batch means include only images with one.

        Raises:
            UserError: no image has a label that counts.
        """
        size, epoch = min(batch_size, len(self.train)), 0
        seed = derive(self.seed, "batches", restart)
        while True:
            shuffle, none = generator(seed, "epoch", epoch), True
            for images, labels in self.train.batches(size, device=self.device, generator=shuffle, drop_last=True):
                if not self.task.all_count:  # without one, no batch has to be looked at
                    rows = self.task.labelled(labels)
                    images, labels = images[rows], labels[rows]
                if len(images):
                    none = False
                    yield images, labels
            if none:
                raise UserError(
                    f"no image of {self.train.name} has a label that counts (all are the ignore index "
                    f"{self.train.ignore_index}): give labels, or images alone"
                )
            epoch += 1

    def targets(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels to leave, or the targets to reach; ignored where the true label is."""
        if self.target is not None:
            targets = torch.full_like(labels, self.target)
        elif not self.predicted_labels:
            return labels
        else:
            with torch.no_grad():
                each = self.averaged.each(images) if isinstance(self.averaged, ModelAverage) else [self.victim(images)]
                targets = torch.stack(list(each)).mean(0).argmax(1)
        return self.task.targets(targets, labels)

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
        """Return the error (or, targeted, the target rate), averaged over the models.

        Args:
            delta: (1, C, H, W).
            split: the images; by default validation.
        """
        split = self.validation if split is None else split
        rates = []
        for victim in self.victims:
            predictions = predict(victim, split, delta, seed=self.seed)
            if self.target is None:
                rates.append(score(predictions, split).error)
            else:
                hits = predictions == self.target
                rates.append(float(hits[split.task.valid(split.labels.cpu())].float().mean()))
        return sum(rates) / len(rates)

    def few(self, images: int) -> Split:
        """Return a random part of the training images, the same for every call."""
        train, task = self.train, self.task
        if task.per_image_label and not task.labels_every_image:
            train = train.subset(task.labelled(train.labels), train.name)
        return train.sample(images, seed=self.seed)


def splits_of(victim: Victim, data: object) -> tuple[Split, Split, int]:
    """Return train, validation and the number of classes of anything a user passes; test is not read.

    Images without labels (N, C, H, W) get the victim's predictions; a fixed fifth of them is validation.
    """
    if not (isinstance(data, torch.Tensor | np.ndarray) and data.ndim == 4):
        dataset = as_dataset(data)
        return dataset.train, dataset.validation, dataset.num_classes
    images = torch.as_tensor(data)
    if len(images) < 2:
        raise UserError(f"got {len(images)} images without labels: expected 2 or more")
    bare = Split("images", images, torch.zeros(len(images), dtype=torch.int64), ("unknown",))
    labels = predict(victim, bare).to(images.device)
    with torch.no_grad():
        classes = victim(bare.take(slice(0, 1), victim.device)[0]).shape[1]
    whole = Split("images", images, labels, tuple(str(k) for k in range(classes)))
    held = whole.sample_indices(max(1, len(images) // 5))
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[held] = False
    return whole.subset(rest, "images/train"), whole.subset(held, "images/validation"), classes


WEAK = 0.05
"""A perturbation with a smaller norm, as a share of eps, has not used its budget."""


class UniversalAttack(Config):
    """Base of the universal attacks: crafted on train, selected on validation, without reading test."""

    gradients: ClassVar[bool] = True
    """Whether the model's gradients are needed; a black box is then refused before it is asked."""
    name: ClassVar[str] = "universal"
    """Name of the attack in the provenance; by default the registered name, or ``FILE.py:CLASS``."""

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    """Norm of the ball."""
    eot_samples: Annotated[int, Field(ge=1)] | None = None
    """Samples of a random model that each gradient is averaged over (expectation over transformation, Athalye et al.
    2018), a forward and a backward each. None (the default is ours): 1 if the model draws independently per image,
    because the batch mean then averages over draws, else :data:`gambeson.victim.averaged.EOT_SAMPLES`. Attacks without
    a loss (DeepFool-UAP, singular vectors, data-free, procedural) use a single sample."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def sees_train(self) -> bool:
        """Whether training images are used; a perturbation is never scored on those."""
        return True

    def craft(
        self, model: Source, data: object, *, seed: int = 0, start: torch.Tensor | None = None
    ) -> UniversalPerturbation:
        """Craft a universal perturbation.

        Args:
            model: any module from pixels to logits, an entered :class:`Victim`, or a list of them, whose losses and
                validation rates are averaged.
            data: a ``Dataset``; a split or an (images, labels) pair, which are split by a fixed rule; or images (N, C,
                H, W) alone, which get the (first) model's predictions as labels.
            seed: of every draw. Validation rates of random models are decided by votes.
            start: (1, C, H, W), the start of an additional restart, scaled to the ball. Attacks without starts use it
                as an additional candidate.

        Raises:
            UserError: no such target class, or data and model that do not fit.
        """
        with self._crafting(model, data, seed) as context, seeded(seed, "noise"):
            given = None if start is None else self._scaled(start.to(context.device), context)
            candidates = [self._checked(one, context) for one in self._search(context, given)]
            if not candidates:
                raise UserError(f"{type(self).__name__} found no perturbation: its _search yielded nothing")
            rates = [context.rate(one.delta) if one.rate is None else one.rate for one in candidates]
            best = max(range(len(rates)), key=rates.__getitem__)
            delta = candidates[best].delta.cpu()
            names = [one.start for one in candidates]
            restarts = list(zip(names, rates, strict=True))
            about = self._about(context, restarts, self._status(delta, candidates[best]))
        return UniversalPerturbation(delta, about, self._seen(context))

    def _checked(self, found: Candidate, context: CraftingContext) -> Candidate:
        made = f"a delta of {tuple(found.delta.shape)}" if isinstance(found, Candidate) else f"a {type(found).__name__}"
        if not isinstance(found, Candidate) or tuple(found.delta.shape) != context.shape:
            raise UserError(f"{type(self).__name__} yields {made}: expected Candidates with a delta of {context.shape}")
        return found

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        """Yield candidates (1, C, H, W) inside the ball; ``start`` is already scaled to it."""
        raise NotImplementedError

    @contextmanager
    def _crafting(self, model: Source, data: object, seed: int) -> Iterator[CraftingContext]:
        with as_victim(model, fast=True, gradients=type(self).__name__ if self.gradients else None) as victim:
            context = self._prepare([victim] if victim is model else list(victim.members) or [victim], data, seed)
            to = getattr(self, "temperature", None)  # None: no loss of the logits
            with rescaled([] if to is None else context.victims, to or 1.0, context.validation, seed):
                yield context

    def _prepare(self, victims: list[Victim], data: object, seed: int) -> CraftingContext:
        before = passes(victims)
        settings = self.plain()
        train, validation, classes = splits_of(victims[0], data)
        if self.sees_train:
            validation = held_out(
                validation,
                train.image_hashes,
                f"images to craft on ({train.name})",
                "select among the restarts on other images than those used for crafting",
            )
        for victim in victims:
            traits = victim.inspect(train.take(slice(0, 8), victim.device)[0])
            for split in (train, validation):
                split.check_logits(traits.shape)
        target: int | None = settings.get("target")
        if target is not None and target >= classes:
            raise UserError(f"target {target} is not a class: expected 0 to {classes - 1}")
        return CraftingContext(
            victims=victims,
            train=train.to(victims[0].device),
            validation=validation,
            ball=self.ball,
            seed=seed,
            target=target,
            predicted_labels=settings.get("labels") == "prediction",
            box_gradient=settings.get("box_gradient", "exact"),
            eot_samples=self.eot_samples,
            before=before,
        )

    def _seen(self, context: CraftingContext) -> torch.Tensor | None:
        """Hashes of the images used for crafting; None if there are none."""
        return context.train.image_hashes if self.sees_train else None

    def _scaled(self, start: torch.Tensor, context: CraftingContext) -> torch.Tensor:
        if start.ndim != 4 or tuple(start.shape[1:]) != tuple(context.train.shape):
            raise UserError(
                f"start has shape {tuple(start.shape)}: expected (1, {', '.join(map(str, context.train.shape))})"
            )
        return self.ball.fill(start) if bool(start.any()) else start

    def _about(
        self,
        context: CraftingContext,
        restarts: list[tuple[str, float]],
        status: Status,
        source_class: int | None = None,
    ) -> Provenance:
        forwards, backwards = (now - old for now, old in zip(passes(context.victims), context.before, strict=True))
        return Provenance(
            attack=vars(type(self)).get("name") or ATTACKS.name_of(type(self)),
            settings=self.plain(),
            eps=self.eps,
            norm=self.norm,
            seed=context.seed,
            model="+".join(fingerprint(victim.model) for victim in context.victims),
            crafted_on=context.train.fingerprint if self.sees_train else "no images",
            crafted_split=context.train.name if self.sees_train else "no images",
            chosen_on=context.validation.name,
            restarts=restarts,
            status=status,
            forwards=forwards,
            backwards=backwards,
            temperature=tuple(victim.temperature or 1.0 for victim in context.victims),
            source_class=source_class,
        )

    def _status(self, delta: torch.Tensor, chosen: Candidate) -> Status:
        length = float(self.ball.length(delta))
        if self.eps > 0 and length < WEAK * self.eps:
            return "weak" if length > 0 else "zero"
        return "done" if chosen.reached else "target not reached"


LabelSource = Literal["truth", "prediction"]
"""Labels that an untargeted attack leaves: the true ones, or the model's clean predictions (as in papers on the fooling
rate; no labels needed, one more forward per image). With several models, the predictions of their mean logits."""


def passes(victims: list[Victim]) -> tuple[int, int]:
    """Return the forwards and backwards of the victims so far, in images; a victim listed twice counts once."""
    unique = {id(victim): victim for victim in victims}.values()
    return sum(victim.forwards for victim in unique), sum(victim.backwards for victim in unique)
