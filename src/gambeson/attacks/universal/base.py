"""Base class of universal attacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from gambeson.attacks.registry import ATTACKS
from gambeson.attacks.universal.context import CraftingContext, passes, splits_of
from gambeson.attacks.universal.perturbation import Provenance, Status, UniversalPerturbation
from gambeson.attacks.universal.target import OMEGA, Target, from_predictions
from gambeson.base import Config, UserError, seeded
from gambeson.base.checks import as_tensor
from gambeson.base.errors import DataWarning
from gambeson.data import Split, held_out
from gambeson.models import fingerprint
from gambeson.threat import Ball, Eps, Norm
from gambeson.threat.edits import EditText, check_edits
from gambeson.victim import Source, Victim, as_victim, auto_batch_size, rescaled


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate perturbation, for validation to select from."""

    start: str
    """Its origin."""
    delta: torch.Tensor
    """(1, C, H, W), inside the ball."""
    rate: float | None = None
    """Its rate on validation, if the search of an attack of this library has computed it; of others it is ignored."""
    reached: bool = True
    """Whether the attack's own stopping rule was met."""


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
    """Samples of a random model, or edits, that each gradient is averaged over (expectation over transformation,
    Athalye et al. 2018), a forward and a backward each. None (the default is ours): 1 if the model draws independently
    per image, because the batch mean then averages over draws, or is not random; else
    :data:`gambeson.victim.averaged.EOT_SAMPLES`. Attacks without a loss (DeepFool-UAP, singular vectors, data-free,
    procedural) use a single sample."""
    edits: tuple[EditText, ...] = ()
    """Edits that the perturbation is to survive (:class:`gambeson.threat.edits.Edit`), such as ``("none", "jpeg:75")``:
    every gradient goes through one of them, drawn with equal probability, in its differentiable form, and rates, by
    which validation selects and attacks without gradients search, are means over all of them, as they are. The ball
    holds before the edit. Labels that are predictions are those of images without edits. Empty: none."""

    @model_validator(mode="after")
    def _omega_has_a_use(self) -> Self:
        target = getattr(self, "target", None)
        if getattr(self, "omega", OMEGA) != OMEGA and getattr(target, "kind", None) != "hide":
            given = "there is no target" if target is None else f"the target is {target}"
            raise ValueError(
                f"omega weighs the pixels of a class to hide, and {given}: leave it out, or set target to hide:CLASS"
            )
        return self

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
            given = None if start is None else self._scaled(as_tensor(start, "start").to(context.device), context)
            return self._chosen(context, [self._checked(one, context) for one in self._search(context, given)])

    def _chosen(self, context: CraftingContext, candidates: list[Candidate]) -> UniversalPerturbation:
        """Return the best candidate on validation, with its provenance."""
        if not candidates:
            raise UserError(f"{type(self).__name__} found no perturbation: its _search yielded nothing")
        ours = type(self).__module__.startswith("gambeson.")  # what other code says of itself is counted again
        rates = [one.rate if ours and one.rate is not None else context.rate(one.delta) for one in candidates]
        best = max(range(len(rates)), key=rates.__getitem__)
        delta = candidates[best].delta.cpu()
        restarts = list(zip([one.start for one in candidates], rates, strict=True))
        about = self._about(context, restarts, self._status(delta, candidates[best]))
        return self._made(context, delta, about)

    def _made(self, context: CraftingContext, delta: torch.Tensor, about: Provenance) -> UniversalPerturbation:
        """Return what was crafted, from the candidate chosen."""
        target = None if context.target is None else context.target.map
        return UniversalPerturbation(delta, about, self._seen(context), target)

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
        train, validation = splits_of(victims[0], data)
        whole = validation
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
        tile = settings.get("tile")
        if tile is not None and (tile[0] > train.shape[1] or tile[1] > train.shape[2]):
            raise UserError(
                f"tile = {tile[0]}x{tile[1]} is larger than the images of {train.shape[1]}x{train.shape[2]} pixels: "
                "expected no larger tile"
            )
        edits = check_edits(self.edits, train.shape, train.task, train.name)
        target, predicted = getattr(self, "target", None), from_predictions(settings)
        context = CraftingContext(
            victims=victims,
            train=train.to(victims[0].device),
            validation=validation,
            ball=self.ball,
            seed=seed,
            omega=settings.get("omega", OMEGA),
            predicted_labels=predicted,
            box_gradient=settings.get("box_gradient", "exact"),
            eot_samples=self.eot_samples,
            edits=tuple(edits),
            before=before,
        )
        if target is None:
            return context
        # An index is that of the user's validation images, before duplicates were left out.
        found = Target.of(target).within(whole, context.predictions if predicted else None)
        context = replace(context, target=found)
        bare = isinstance(data, torch.Tensor | np.ndarray)  # whose labels are predictions
        if found.kind == "class" and not (train.task.per_image_label or bare):
            self._warn_unseen(train, found.index)
        if context.hides:
            self._require_hidden(context)
        return context

    @staticmethod
    def _warn_unseen(train: Split, target: int) -> None:
        """Warn of a class that no label map shows; one label per image is often without the target on purpose."""
        if not any(bool((labels == target).any()) for _, labels in train.batches(auto_batch_size(train.shape))):
            warnings.warn(
                f"no pixel of {train.name} is labelled {train.classes[target]!r}: a model trained on these images does "
                "not know this target, and is not robust because it does not reach it; name a class that occurs",
                DataWarning,
                stacklevel=2,
            )

    @staticmethod
    def _require_hidden(context: CraftingContext) -> None:
        """Refuse a class to hide that no image shows, and say how many training images have no target."""
        assert context.target is not None
        for split in (context.train, context.validation):
            targets, hidden = context.reach(split)
            name, seen = split.classes[context.target.index], "predicted" if context.predicted_labels else "labelled"
            if hidden is None or not bool(hidden.any()):
                raise UserError(f"no pixel of {split.name} is {seen} {name!r}: name another class to hide")
            if not bool((targets >= 0).any()):
                raise UserError(f"every pixel of {split.name} is {seen} {name!r}: name another class to hide")
        if context.left_out:
            warnings.warn(
                f"{context.left_out} of the {len(context.train)} training images show nothing but the class to hide: "
                "they have no target, and are left out",
                DataWarning,
                stacklevel=2,
            )

    def _seen(self, context: CraftingContext) -> torch.Tensor | None:
        """Hashes of the images used for crafting; None if there are none."""
        return context.train.image_hashes if self.sees_train else None

    def _scaled(self, start: torch.Tensor, context: CraftingContext) -> torch.Tensor:
        if start.ndim != 4 or tuple(start.shape[1:]) != context.shape[1:]:
            raise UserError(
                f"start has shape {tuple(start.shape)}: expected (1, {', '.join(map(str, context.shape[1:]))})"
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
            target_hash=None if context.target is None else context.target.hash,
            left_out=context.left_out,
        )

    def _status(self, delta: torch.Tensor, chosen: Candidate) -> Status:
        length = float(self.ball.length(delta))
        if self.eps > 0 and length < WEAK * self.eps:
            return "weak" if length > 0 else "zero"
        return "done" if chosen.reached else "target not reached"
