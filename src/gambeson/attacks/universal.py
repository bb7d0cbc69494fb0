"""Stochastic PGD: one perturbation for all images, climbed over a stream of mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.perturbation import Provenance, UniversalPerturbation
from gambeson.attacks.solver import Ascent
from gambeson.base import Config, Number, UserError, derive, generator
from gambeson.data import Split, as_dataset
from gambeson.models import fingerprint
from gambeson.threat import Ball, BoxGradient, Eps, Norm
from gambeson.victim import Victim, predict, score

WEAK = 0.05
"""A perturbation whose norm stays below this share of eps has not used its budget."""


class StochasticPGD(Config):
    """Stochastic projected gradient descent for universal perturbations.

    Maximises mean_i min(CE(f(clip(x_i + delta)), y_i), kappa) over the ball by steps on mini-batches (Shafahi et
    al., arXiv 1811.11304; the attack of Mummadi et al. 2019). Neither paper's schedule or number of restarts is
    known: all defaults here are ours, but for the truncation kappa = -log 0.2 of Mummadi et al.

    Crafted on ``data.train``; ``data.validation`` chooses among restarts; ``data.test`` is never looked at.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    steps: Annotated[int, Field(ge=1)] = 200
    """Gradient steps a restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step."""
    step: Annotated[Number, Field(gt=0)] = 0.25
    """Length of the first step as a share of eps."""
    final_step: Annotated[Number, Field(gt=0)] = 0.01
    """Length of the last step as a share of eps; the lengths between follow a cosine."""
    truncate: Number | None = -math.log(0.2)
    """Truth less likely than exp(-truncate): the image is fooled and has no more say. None: plain cross-entropy."""
    target_floor: Number = 0.05
    """Targeted only: an image whose cross-entropy to the target is below this has no more say."""
    restarts: Annotated[int, Field(ge=1)] = 4
    """The first starts from zero, the others from random signs."""
    target: Annotated[int, Field(ge=0)] | None = None
    """Class that every image should be taken for; None: any wrong class."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; ``exact`` is the papers'."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def lengths(self) -> list[float]:
        """Length of each step in pixel units: a cosine from ``step`` to ``final_step``, times eps."""
        last = max(1, self.steps - 1)
        waves = [(1 + math.cos(math.pi * k / last)) / 2 for k in range(self.steps)]
        return [self.eps * (self.final_step + (self.step - self.final_step) * wave) for wave in waves]

    def craft(
        self,
        model: nn.Module | Victim,
        data: object,
        *,
        seed: int = 0,
        start: torch.Tensor | None = None,
    ) -> UniversalPerturbation:
        """Craft a universal perturbation.

        Args:
            model: any module from pixels to logits, or a :class:`Victim` already entered.
            data: a ``Dataset``, a split, or an (images, labels) pair; the latter two are split by a fixed rule.
            seed: of the starts and the mini-batches.
            start: (1, C, H, W), a perturbation to start one more restart from, scaled to the ball.

        Raises:
            UserError: no such target class, or data and model that do not fit.
        """
        if not isinstance(model, Victim):
            with Victim(model) as victim:
                return self.craft(victim, data, seed=seed, start=start)
        dataset = as_dataset(data)
        if self.target is not None and self.target >= dataset.num_classes:
            raise UserError(f"target {self.target} is not a class: expected 0 to {dataset.num_classes - 1}")
        before = (model.forwards, model.backwards)
        train = dataset.train.to(model.device)
        starts = ["zero", *["sign"] * (self.restarts - 1)]
        candidates = [self._climb(model, train, kind, seed, k) for k, kind in enumerate(starts)]
        if start is not None:
            starts.append("warm")
            given = self.ball.fill(start.to(model.device)) if bool(start.any()) else start.to(model.device)
            candidates.append(self._climb(model, train, given, seed, len(candidates)))
        judge = dataset.validation
        rates = [self._rate(model, judge, delta) for delta in candidates]
        best = max(range(len(rates)), key=rates.__getitem__)
        delta = candidates[best].cpu()
        return UniversalPerturbation(
            delta,
            Provenance(
                attack="stochastic-pgd",
                settings=self.plain(),
                eps=self.eps,
                norm=self.norm,
                seed=seed,
                model=fingerprint(model.model),
                crafted_on=dataset.train.fingerprint,
                crafted_split=dataset.train.name,
                chosen_on=judge.name,
                restarts=list(zip(starts, rates, strict=True)),
                status=self._status(delta),
                forwards=model.forwards - before[0],
                backwards=model.backwards - before[1],
            ),
        )

    def _climb(
        self, victim: Victim, train: Split, start: str | torch.Tensor, seed: int, restart: int
    ) -> torch.Tensor:
        truncate = self.truncate if self.target is None else self.target_floor
        loss = Loss(targeted=self.target is not None, truncate=truncate)
        ascent = Ascent(
            victim=victim,
            ball=self.ball,
            loss=loss,
            box_gradient=self.box_gradient,
            ignore_index=train.ignore_index,
        )
        stream = self._stream(train, victim, derive(seed, "batches", restart))
        if isinstance(start, str):
            draw = generator(seed, "start", restart, device=victim.device)
            example, _ = train.take(slice(0, 1), victim.device)
            start = ascent.start(example, 1, start, 1.0, draw)
        return ascent.run(start, stream, self.lengths)

    def _stream(self, train: Split, victim: Victim, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Whole epochs in a new order each, for as long as the solver asks.
        size, epoch = min(self.batch_size, len(train)), 0
        while True:
            shuffle = generator(seed, "epoch", epoch)
            for images, labels in train.batches(
                size, device=victim.device, generator=shuffle, drop_last=True
            ):
                yield images, labels if self.target is None else torch.full_like(labels, self.target)
            epoch += 1

    def _rate(self, victim: Victim, split: Split, delta: torch.Tensor) -> float:
        predictions = predict(victim, split, delta)
        if self.target is None:
            return score(predictions, split).error
        return float((predictions == self.target).float().mean())

    def _status(self, delta: torch.Tensor) -> Literal["done", "weak", "zero"]:
        length = float(self.ball.length(delta))
        if self.eps == 0 or length >= WEAK * self.eps:
            return "done"
        return "weak" if length > 0 else "zero"
