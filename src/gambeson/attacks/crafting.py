"""What every universal attack shares: models, splits, starts, the choice on validation, and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gambeson.attacks.perturbation import Provenance, Status, UniversalPerturbation
from gambeson.attacks.registry import ATTACKS
from gambeson.attacks.sources import Source, entered
from gambeson.attacks.workshop import Candidate, Workshop, splits_of
from gambeson.base import Config, UserError, seeded
from gambeson.data import held_out
from gambeson.models import fingerprint
from gambeson.threat import Ball, Eps, Norm
from gambeson.victim import Victim

WEAK = 0.05
"""A perturbation whose norm stays below this share of eps has not used its budget."""


class UniversalAttack(Config):
    """Base of the universal attacks: crafted on train, chosen on validation, never looking at test."""

    name: ClassVar[str] = "universal"
    """What provenance calls the attack. A class of your own need not set it: the name under which it is registered, or
    ``FILE.py:CLASS``, is taken, by which it is found again."""
    looks_at_train: ClassVar[bool] = True
    """Whether it sees training images at all."""

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"
    """Norm of the ball."""
    eot_samples: Annotated[int, Field(ge=1)] | None = None
    """Fresh draws of a random model that the gradient of a loss is averaged over at every step (expectation over
    transformation, Athalye et al. 2018), each a forward and a backward. None (the default is ours): one where the
    model draws for each image by itself, since the mean over a batch is one over draws then, and
    :data:`gambeson.attacks.sources.EOT_SAMPLES` where all images of a batch share a draw. Attacks without a loss
    (DeepFool-UAP, singular vectors, data-free, procedural) take a draw each time."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def sees_train(self) -> bool:
        """Whether training images are looked at: a perturbation is never scored on the images it was made from."""
        return True

    def craft(
        self, model: Source, data: object, *, seed: int = 0, start: torch.Tensor | None = None
    ) -> UniversalPerturbation:
        """Craft a universal perturbation.

        Args:
            model: any module from pixels to logits, a :class:`Victim` already entered, or a list of them: the
                losses of several are averaged, and so are the rates that choose.
            data: a ``Dataset``; a split or an (images, labels) pair, which are split by a fixed rule; or images
                (N, C, H, W) alone, which get the (first) model's own predictions as labels.
            seed: of every draw. The rates that choose are decided by votes where a model is random, as everywhere.
            start: (1, C, H, W), a perturbation to start one more restart from, scaled to the ball. An attack that
                cannot start from one takes it as one more candidate.

        Raises:
            UserError: no such target class, or data and model that do not fit.
        """
        with entered(model) as victims, seeded(seed, "noise"):
            spent = tally(victims)
            work = self._prepare(victims, data, seed)
            given = None if start is None else self._scaled(start.to(work.device), work)
            candidates = list(self._search(work, given))
            rates = [work.rate(one.delta) if one.rate is None else one.rate for one in candidates]
            best = max(range(len(rates)), key=rates.__getitem__)
            delta = candidates[best].delta.cpu()
            names = [one.start for one in candidates]
            restarts = list(zip(names, rates, strict=True))
            about = self._about(work, spent(), restarts, self._status(delta, candidates[best]))
        return UniversalPerturbation(delta, about, self._seen(work))

    def _search(self, work: Workshop, start: torch.Tensor | None) -> Iterable[Candidate]:
        """Make candidates (1, C, H, W) inside the ball; ``start`` is already scaled to it."""
        raise NotImplementedError

    def _prepare(self, victims: list[Victim], data: object, seed: int) -> Workshop:
        settings = self.plain()
        train, validation, classes = splits_of(victims[0], data)
        if self.sees_train:
            validation = held_out(
                validation,
                train.image_hashes,
                f"images to craft on ({train.name})",
                "choose among the restarts on other images than are crafted on",
            )
        for victim in victims:
            victim.meet(train.take(slice(0, 8), victim.device)[0])
        target: int | None = settings.get("target")
        if target is not None and target >= classes:
            raise UserError(f"target {target} is not a class: expected 0 to {classes - 1}")
        return Workshop(
            victims=victims,
            train=train.to(victims[0].device),
            validation=validation,
            ball=self.ball,
            seed=seed,
            target=target,
            predicted_labels=settings.get("labels") == "prediction",
            box_gradient=settings.get("box_gradient", "exact"),
            eot_samples=self.eot_samples,
        )

    def _seen(self, work: Workshop) -> torch.Tensor | None:
        """Hashes of the images that are crafted on; none where no image is looked at."""
        return work.train.image_hashes if self.sees_train else None

    def _scaled(self, start: torch.Tensor, work: Workshop) -> torch.Tensor:
        if start.ndim != 4 or tuple(start.shape[1:]) != tuple(work.train.shape):
            raise UserError(
                f"start has shape {tuple(start.shape)}: expected (1, {', '.join(map(str, work.train.shape))})"
            )
        return self.ball.fill(start) if bool(start.any()) else start

    def _about(
        self,
        work: Workshop,
        spent: tuple[int, int],
        restarts: list[tuple[str, float]],
        status: Status,
        source_class: int | None = None,
    ) -> Provenance:
        return Provenance(
            attack=vars(type(self)).get("name") or ATTACKS.name_of(type(self)),
            settings=self.plain(),
            eps=self.eps,
            norm=self.norm,
            seed=work.seed,
            model="+".join(fingerprint(victim.model) for victim in work.victims),
            crafted_on=work.train.fingerprint if self.sees_train else "no images",
            crafted_split=work.train.name if self.sees_train else "no images",
            chosen_on=work.validation.name,
            restarts=restarts,
            status=status,
            forwards=spent[0],
            backwards=spent[1],
            source_class=source_class,
        )

    def _status(self, delta: torch.Tensor, chosen: Candidate) -> Status:
        length = float(self.ball.length(delta))
        if self.eps > 0 and length < WEAK * self.eps:
            return "weak" if length > 0 else "zero"
        return "done" if chosen.reached else "target not reached"


LabelSource = Literal["truth", "prediction"]
"""Which labels an untargeted attack leaves: the true ones, or the model's clean predictions (the papers of the
fooling rate; needs no labels and one more forward an image). With several models, those of their mean logits."""


def tally(victims: list[Victim]) -> Callable[[], tuple[int, int]]:
    """Return a function that says what the victims have spent since: forwards and backwards, in images.

    A victim that is listed twice is counted once.
    """
    unique = list({id(victim): victim for victim in victims}.values())

    def now() -> tuple[int, int]:
        return sum(victim.forwards for victim in unique), sum(victim.backwards for victim in unique)

    before = now()
    return lambda: (now()[0] - before[0], now()[1] - before[1])
