"""Success of a targeted universal perturbation, beside what clean images, controls and other targets reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gambeson.attacks import Target, UniversalPerturbation
from gambeson.attacks.universal.target import from_predictions
from gambeson.base import Config, UserError, generator
from gambeson.data import Split, as_split
from gambeson.evaluation.universal import controls_beside, scorable
from gambeson.tasks import Rate
from gambeson.victim import Victim, as_victim, predict

SHUFFLED = "shuffled target map"
SHUFFLES = 10
"""Draws of the shuffled target map (ours)."""


class Reached(Config):
    """How far something reaches a target, over the pixels (or images) whose label counts.

    All intervals are over images.
    """

    success: Rate
    """Share that is taken for its target."""
    hidden: Rate | None = None
    """With a class to hide: share of its pixels that are no longer taken for it."""
    kept: Rate | None = None
    """With a class to hide: share of all other pixels that are taken for what they were, or are."""

    @property
    def score(self) -> float:
        """The success; with a class to hide, the mean of what is hidden and what is kept."""
        if self.hidden is None or self.kept is None:
            return self.success.value
        return (self.hidden.value + self.kept.value) / 2


class TargetControl(Reached):
    """What a control reaches of the target: its best draw, whose intervals hold for all draws at once."""

    name: str
    """A control of :data:`gambeson.attacks.CONTROLS`; or :data:`SHUFFLED`: the crafted perturbation, held against the
    target maps of other images, which is what it reaches by chance."""
    draws: int


class TargetSuccess(Reached):
    """How far a perturbation reaches its target."""

    clean: Rate
    """The success of clean images: what is reached without an attack."""
    controls: tuple[TargetControl, ...] = ()

    @property
    def rival(self) -> TargetControl | None:
        """A control that reaches as much: in the score, or if it has no class to hide, in the success; None if none."""
        return next((one for one in self.controls if one.score >= self._beside(one)), None)

    def _beside(self, control: TargetControl) -> float:
        return self.success.value if control.hidden is None else self.score


@dataclass(frozen=True)
class TargetHits:
    """What each image has reached (:meth:`gambeson.attacks.Target.hits`).

    A measure for :func:`gambeson.evaluation.eps_uni`; the share is that of :meth:`gambeson.attacks.Target.rate`.
    """

    hits: torch.Tensor
    """(N, G) int64, of one or two groups."""
    totals: torch.Tensor
    """(N, G) int64: units with a target."""

    @property
    def images(self) -> int:
        """Images with a target."""
        return int((self.totals > 0).any(1).sum())

    @property
    def rows(self) -> torch.Tensor:
        """(N, 2 G): the counts."""
        return torch.cat([self.hits, self.totals], 1)

    def of_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the share for each row of sums over images, (B, 2 G)."""
        hits, totals = sums.chunk(2, 1)
        return (hits / totals.clamp(min=1)).sum(1) / (totals > 0).sum(1).clamp(min=1)

    @property
    def error(self) -> float:
        """The share for these images, from 0 to 1; an error in that higher is worse for the model."""
        return float(self.of_sums(self.rows.sum(0, keepdim=True).double()))


@dataclass(frozen=True)
class Goal:
    """The target of one model on one split: what each unit should be taken for."""

    split: Split
    clean: torch.Tensor
    """Clean predictions, (N,) or (N, H, W), as are the others."""
    target: Target
    targets: torch.Tensor
    """-1 where there is none."""
    hidden: torch.Tensor | None = None
    """Which pixels are to be hidden."""

    @classmethod
    def of(cls, victim: Victim, split: Split, target: Target, *, predicted: bool = True, seed: int = 0) -> Goal:
        """Find the target in clean predictions, or else in the true labels.

        Raises:
            UserError: it does not fit the split, nothing has a target, or no pixel is of the class to hide.
        """
        if target.kind == "static" and target.map is None:
            raise UserError(f"target {target} is an image of validation: give its map, such as uap.target")
        target, clean, labels = target.within(split), predict(victim, split, seed=seed), split.labels.cpu()
        made_of = clean if predicted and target.kind == "hide" else labels
        targets, hidden = target.reach(made_of, split.task.valid(labels))
        if not bool((targets >= 0).any()):
            raise UserError(f"target {target}: no image of {split.name} has one; give images with labels that count")
        if hidden is not None and not bool(hidden.any()):
            seen = "predicted" if predicted else "labelled"
            raise UserError(
                f"no pixel of {split.name} is {seen} {split.classes[target.index]!r}: nothing can be hidden"
            )
        return cls(split, clean, target, targets, hidden)

    def hits(self, predictions: torch.Tensor) -> TargetHits:
        """Count what reaches the target."""
        parts = self.target.hits(predictions, self.targets, self.hidden)
        counts = [torch.stack([self._count(part) for part in column], 1) for column in zip(*parts, strict=True)]
        return TargetHits(*counts)

    def success(self, predictions: torch.Tensor, seed: int = 0) -> TargetSuccess:
        """Return the rates of predictions."""

        def rate(hits: torch.Tensor, totals: torch.Tensor) -> Rate:
            return Rate.bootstrap(hits, totals, seed=seed)

        own = self.targets >= 0
        exact, clean = (
            rate(self._count(own & (one == self.targets)), self._count(own)) for one in (predictions, self.clean)
        )
        found = self.hits(predictions)
        groups = [rate(hits, totals) for hits, totals in zip(found.hits.T, found.totals.T, strict=True)]
        hidden, kept = (None, None) if self.hidden is None else groups
        return TargetSuccess(success=exact, clean=clean, hidden=hidden, kept=kept)

    def shuffled(self, draws: int, seed: int) -> list[Goal]:
        """Return up to ``draws`` goals with the target maps of other images.

        A class to hide is that of another image for every image. A static map is replaced by the clean prediction of
        an image. A class alone has no map to shuffle.
        """
        valid, draw = self.split.task.valid(self.split.labels.cpu()), generator(seed, "shuffled targets")
        if self.target.kind == "static":
            others = [self.clean[row].expand_as(self.targets) for row in _some(len(self.split), draws, draw)]
        elif self.target.kind == "hide":
            others = [self.targets.roll(1 + shift, 0) for shift in _some(len(self.split) - 1, draws, draw)]
        else:
            others = []
        return [Goal(self.split, self.clean, self.target, other.where(valid, -1)) for other in others]

    def _count(self, units: torch.Tensor) -> torch.Tensor:
        return self.split.task.units(units).sum(1)


def target_success(
    model: nn.Module | Victim,
    data: object,
    uap: UniversalPerturbation,
    *,
    seed: int = 0,
    controls: Iterable[str] = (),
) -> TargetSuccess:
    """Measure how far a perturbation reaches the target that it was crafted for.

    A class to hide is looked for in what the model at hand predicts on clean images, or in the true labels if the
    perturbation was crafted with ``labels="truth"``.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        uap: the perturbation; images that it was crafted on are left out.
        seed: of a random model's votes, the controls' draws and the intervals.
        controls: names in :data:`gambeson.attacks.CONTROLS`, or :data:`gambeson.attacks.PATCH_CONTROLS` of a patch; if
            there are any, the shuffled target map is added.

    Raises:
        UserError: the perturbation has no target, one that does not fit the data, or a class to hide that no pixel has.
    """
    split, target = scorable(data, uap), uap.target
    if target is None:
        raise UserError("the perturbation has no target: score it by universal_evasion, or craft it with a target")
    predicted, names = from_predictions(uap.about.settings), list(controls)
    beside = controls_beside(uap, as_split(data, "test"), seed, names)
    with as_victim(model) as victim:
        goal = Goal.of(victim, split, target, predicted=predicted, seed=seed)
        reached = predict(victim, split, uap.shared(victim.device), seed=seed)
        found = []
        for name in names:
            drawn = [(goal, predict(victim, split, one.to(victim.device), seed=seed)) for one in beside[name]]
            found.append(_control(name, drawn, seed))
    if names and (others := goal.shuffled(SHUFFLES, seed)):
        found.append(_control(SHUFFLED, [(other, reached) for other in others], seed))
    return goal.success(reached, seed).model_copy(update={"controls": tuple(found)})


def _some(most: int, draws: int, draw: torch.Generator) -> list[int]:
    return torch.randperm(most, generator=draw)[:draws].tolist()


def _control(name: str, drawn: list[tuple[Goal, torch.Tensor]], seed: int) -> TargetControl:
    goal, predictions = max(drawn, key=lambda one: one[0].hits(one[1]).error)
    best, draws = goal.success(predictions, seed), len(drawn)
    return TargetControl(
        name=name,
        draws=draws,
        success=best.success.among(draws),
        hidden=None if best.hidden is None else best.hidden.among(draws),
        kept=None if best.kept is None else best.kept.among(draws),
    )


class TargetMeasure:
    """The success of a target as a measure for :func:`gambeson.evaluation.eps_uni`.

    Args:
        target: a target, or what :meth:`gambeson.attacks.Target.of` takes, but a validation image by its index.
        labels: where a class to hide is looked for, ``prediction`` or ``truth``.
    """

    def __init__(self, target: object, labels: str = "prediction") -> None:
        self.target, self.predicted = Target.of(target), labels == "prediction"  # type: ignore[arg-type]
        self.name = f"target {self.target}"
        self._goals: list[tuple[Victim, Goal]] = []

    @classmethod
    def of(cls, victim: Victim, validation: Split, target: object, labels: str, *, seed: int = 0) -> TargetMeasure:
        """As the constructor, also for a validation image by its index: its map is found as an attack finds it."""
        found = Target.of(target).within(  # type: ignore[arg-type]
            validation, (lambda split: predict(victim, split, seed=seed)) if labels == "prediction" else None
        )
        return cls(found, labels)

    def __call__(self, victim: Victim, split: Split, delta: torch.Tensor | None) -> TargetHits:
        """Count what reaches the target."""
        goal = next((goal for model, goal in self._goals if model is victim and goal.split is split), None)
        if goal is None:  # another model predicts something else on the same images
            self._goals = [known for known in self._goals if known[0] is victim]
            goal = Goal.of(victim, split, self.target, predicted=self.predicted)
            self._goals.append((victim, goal))
        return goal.hits(goal.clean if delta is None else predict(victim, split, delta))
