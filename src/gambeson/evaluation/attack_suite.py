"""Attack suites: the worst case per image over several attacks, scored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gambeson.attacks import PGD, SEA, AutoPGD, Square, TargetedAutoPGD
from gambeson.base import Config, UserError, derive, seeded, task
from gambeson.data import Dataset, Split
from gambeson.evaluation.outcome import ImageAttack, at_once, attacked, averaged, checked
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.segmentation_suite import MapResult, WorstMaps, class_pixels
from gambeson.evaluation.universal import scored
from gambeson.tasks import CLASSIFICATION, Counts, Rate, Task
from gambeson.threat import Ball, Norm
from gambeson.victim import Victim, nothing_counts, predict, votes_of, votes_right

SURE = 0.25
"""Largest share of correct votes at which an image of a random model counts as broken for good, so that later attacks
skip it (ours): if half of all its passes were correct, so few of 21 votes would occur once in 75 times."""


class AttackRound(Config):
    """Result of one attack of the suite."""

    attack: str
    tried: int
    """Images attacked: all that no previous attack had broken for good."""
    broken: int
    """Images broken for good: for a random model, those with at most :data:`SURE` of their votes correct."""
    accuracy: Rate
    """Accuracy under the worst of the attacks so far; for a random model by the majority of fresh votes, which were not
    used for any selection."""
    cost: Cost


class SuiteResult(Config):
    """Accuracy under the worst of several attacks per image; of label maps the pixel accuracy.

    The worst case is decided per image, by a procedure fixed beforehand. The correct images are therefore one binomial
    count, and ``robust`` has the interval of a single rate for any number of attacks. Of label maps, the interval is by
    bootstrap over images.
    """

    clean: Rate
    """Accuracy on clean images."""
    robust: Rate
    """Accuracy under the worst of the attacks, including the clean image."""
    success: Rate
    """Attack success rate on images, of label maps pixels, that are correct when clean; for a random model the net loss
    (of label maps per image), because some change between two counts by chance."""
    votes: int = 1
    """Votes per image: more than one for a random model."""
    rounds: list[AttackRound]
    largest: float
    """Largest norm of a successful perturbation, measured on the stored images."""
    mean: float
    """Mean norm of these."""
    maps: MapResult | None = None
    """Of label maps: their mean IoU under the attacks, and each attack by itself."""


@dataclass(frozen=True)
class SuiteRun:
    """A finished suite of attacks."""

    result: SuiteResult
    images: torch.Tensor
    """The worst candidate of each image, or the clean image: scoring these with the seed of the suite gives
    ``result.robust`` exactly."""
    counts: Counts
    """What is right of each of these, of which ``result.robust`` is the accuracy."""
    broken_by: torch.Tensor
    """Index of the attack that broke each image; -1 none, -2 wrong without an attack, -3 its label does not count. Of
    label maps: of the attack under which the fewest pixels are right; -1 if no attack lowers their number."""
    iou_images: torch.Tensor | None = None
    """Label maps only: the candidates that a greedy choice takes for a low mean IoU over all images."""
    iou_broken_by: torch.Tensor | None = None
    """Index of the attack that made each of these; -1 for a clean image."""


class WorstCase:
    """The worst candidate of each image in a split, starting with the clean image.

    Candidates are compared by their correct votes (:func:`gambeson.victim.votes_right`), drawn for this selection only.
    Selection by votes favours unlucky candidates, so the selected ones are scored on other votes (:meth:`right`), those
    of the clean images, with the same seed. A candidate no more harmful than the clean image, however often it is
    tried, then changes the number by no more than the sampling error of one count; the clean image as a candidate
    changes nothing. Deterministic models have a single vote.

    Args:
        victim: the model, inside its context.
        split: images with one label each.
        seed: of a random model's votes.
        batch_size: maximum batch size; smaller for large images.

    Attributes:
        images: (N, C, H, W), the worst candidates, on the model's device.
        clean_images: (N, C, H, W).
        source: (N,) the source of each: -1 for the clean image, else the argument of :meth:`offer`.
        votes: votes per image.

    Raises:
        UserError: labels are not one per image, no label counts, or some logits are not finite.
    """

    def __init__(self, victim: Victim, split: Split, *, seed: int = 0, batch_size: int = 250) -> None:
        if len(split) == 0:
            raise nothing_counts(split)
        split.task.require_classification("the worst case over attacks")
        self.victim, self.split, self.seed = victim, split, seed
        self.batch_size = at_once(split, batch_size)
        self.images, self.labels = split.take(slice(None), victim.device)
        self.counts = split.task.valid(self.labels)
        if not bool(self.counts.any()):
            raise nothing_counts(split)
        self.votes = votes_of(victim, self.images)
        traits = victim.inspect(self.images, scores=True)
        self._random = traits.stochastic
        split.check_logits(traits.shape)
        self.clean_images = self.images.clone()
        self._support = torch.zeros_like(self.labels)
        self.source = torch.full_like(self.labels, -1)
        for rows in torch.arange(len(self.labels), device=self.labels.device).split(self.batch_size):
            self._support[rows] = self._votes(self.images[rows], rows, "clean")

    @property
    def survivors(self) -> torch.Tensor:
        """Indices of the images still to be attacked: they count, and are not broken for good."""
        return (self.counts & (self._support > SURE * self.votes)).nonzero().flatten()

    def begin(self) -> torch.Tensor:
        """Begin another attack, and return the images to try it on."""
        return self.survivors

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return clean images with their labels."""
        return self.clean_images[rows], self.labels[rows]

    def offer(self, rows: torch.Tensor, moved: torch.Tensor, source: int) -> None:
        """Keep candidates ``moved`` of the images with indices ``rows`` if they do more harm than the current ones."""
        support = self._votes(moved, rows, source)
        worse = support < self._support[rows]
        rows = rows[worse]
        self.images[rows], self._support[rows], self.source[rows] = moved[worse], support[worse], source

    def right(self) -> torch.Tensor:
        """Return which images are correct (N,), scoring the worst candidate of each on fresh votes."""
        if not self._random:
            return self.counts & (2 * self._support > self.votes)
        now = self.split.with_images(self.images)
        with seeded(self.seed, "score"):  # where a single pass decides, predict leaves the seed to its caller
            counts = now.counts(predict(self.victim, now, seed=self.seed))
        return counts.right.to(self.labels.device) > 0

    def scored(self) -> Counts:
        """Return :meth:`right` as counts."""
        return Counts(self.right().long(), self.counts.long())

    def _votes(self, images: torch.Tensor, rows: torch.Tensor, source: int | str) -> torch.Tensor:
        with seeded(self.seed, "candidate", source, int(rows[0])):
            return votes_right(self.victim, images, self.labels[rows], self.split.task)


@scored
def run_suite(
    victim: Victim,
    split: Split,
    attacks: Mapping[str, ImageAttack | torch.Tensor],
    *,
    norm: str = "inf",
    seed: int = 0,
    batch_size: int = 250,
) -> SuiteRun:
    """Attack every image with each attack in turn until one breaks it, and score the worst case of each image once.

    Label maps are attacked until no labelled pixel is right; their worst cases are those of :class:`MapResult`.

    Success is decided on the model itself, by the images an attack returned, not by the attack. For a random model,
    decided by the majority of votes (:func:`gambeson.victim.votes_of`), the candidate with the fewest correct votes is
    kept, and only that one is scored, on fresh votes: see :class:`WorstCase`.

    Args:
        victim: the model, inside its context.
        split: the images.
        attacks: by name, cheapest first; or the images (N, C, H, W) that an earlier one made of the split's. On a
            random model, gradient attacks without ``eot_samples`` average over
            :data:`gambeson.victim.averaged.EOT_SAMPLES`.
        norm: of the reported distances.
        seed: of every attack, and of a random model's votes.
        batch_size: maximum batch size; smaller for large images.

    Raises:
        UserError: no label counts, some logits are not finite, or an attack does not return images, or stored ones are
            none of the split's (:func:`gambeson.evaluation.outcome.checked`).
    """
    if not isinstance(attacks, Mapping):
        raise UserError(f"attacks is a {type(attacks).__name__}: give attacks by their names, {{'pgd': PGD(eps=0.1)}}")
    of_maps, norm = not split.task.per_image_label, Ball(**{"eps": 0, "norm": norm}).norm
    worst = (WorstMaps if of_maps else WorstCase)(victim, split, seed=seed, batch_size=batch_size)
    clean = right = worst.scored()
    for name, attack in attacks.items():
        if isinstance(attack, torch.Tensor) and len(attack) != len(split):
            raise UserError(
                f"{len(attack)} images of attack {name!r} came for the {len(split)} of {split.name}: give one for each"
            )
    first = split.take(slice(0, 8), victim.device)[0]
    attacks = {
        name: one if isinstance(one, torch.Tensor) else averaged(one, victim, first) for name, one in attacks.items()
    }
    rounds = []
    with task("  attack suite", len(attacks)) as advance:
        for k, (name, attack) in enumerate(attacks.items()):
            before, rows = (victim.forwards, victim.backwards), worst.begin()
            for j, part in enumerate(rows.split(worst.batch_size) if len(rows) else ()):
                (x, y), stream = worst.take(part), derive(seed, name, j)
                if isinstance(attack, torch.Tensor):
                    stored = attack[part.to(attack.device)].to(x.device)
                    worst.offer(part, checked(stored, x, attack, name), k)
                    continue
                with seeded(stream, "attack"):  # for an attack, or a model, that draws from torch's own generators
                    moved = attacked(attack, victim, x, y, seed=stream, task=split.task, name=name)
                worst.offer(part, moved, k)
            right = worst.scored()
            rounds.append(
                AttackRound(
                    attack=name,
                    tried=len(rows),
                    broken=len(rows) - len(worst.survivors),
                    accuracy=right.accuracy,
                    cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
                )
            )
            advance()
    settled = rounds, clean, norm
    return _of_maps(worst, *settled) if isinstance(worst, WorstMaps) else _of_images(worst, right, *settled)


def _of_images(worst: WorstCase, right: Counts, rounds: list[AttackRound], clean: Counts, norm: str) -> SuiteRun:
    was, now = clean.right > 0, right.right > 0
    broken = was & ~now & (worst.source >= 0)
    broken_by = torch.where(broken, worst.source, torch.where(now, -1, -2)).masked_fill(~worst.counts, -3)
    before, left = int(clean.right.sum()), int(right.right.sum())
    success = Rate.of(max(0, before - left), before)
    result = _result(rounds, clean, right, success, worst, worst.images - worst.clean_images, broken, norm)
    return SuiteRun(result=result, images=worst.images.cpu(), counts=right, broken_by=broken_by.cpu())


def _of_maps(worst: WorstMaps, rounds: list[AttackRound], clean: Counts, norm: str) -> SuiteRun:
    found = worst.finish(turn.attack for turn in rounds)
    moved = found.images - worst.split.take(slice(None), "cpu")[0]
    success = Rate.bootstrap((clean.right - found.right.right).clamp(min=0), clean.right)
    result = _result(rounds, clean, found.right, success, worst, moved, found.source >= 0, norm)
    return SuiteRun(
        result=result.model_copy(update={"maps": found.result}),
        images=found.images,
        counts=found.right,
        broken_by=found.source.masked_fill(clean.total == 0, -3),
        iou_images=found.iou_images,
        iou_broken_by=found.iou_source,
    )


def _result(
    rounds: list[AttackRound],
    clean: Counts,
    right: Counts,
    success: Rate,
    worst: WorstCase | WorstMaps,
    moved: torch.Tensor,
    broken: torch.Tensor,
    norm: str,
) -> SuiteResult:
    distances = moved.flatten(1).norm(p=float(norm), dim=1)[broken]
    return SuiteResult(
        clean=clean.accuracy,
        robust=right.accuracy,
        success=success,
        votes=worst.votes,
        rounds=rounds,
        largest=float(distances.max()) if len(distances) else 0.0,
        mean=float(distances.mean()) if len(distances) else 0.0,
    )


def standard_suite(
    *,
    eps: float | str,
    norm: Norm = "inf",
    queries: int | None = None,
    faithful: bool = False,
    eot_samples: int | None = None,
    task: Task = CLASSIFICATION,
    class_pixels: Sequence[float] | None = None,
) -> dict[str, ImageAttack]:
    """Return the attacks of the standard suite, to be run by :func:`gambeson.evaluation.run_suite`.

    The members of AutoAttack's standard version (Croce and Hein 2020, section 6) without FAB, behind a short PGD that
    takes what is easy and, in the norm inf, keeps off the corners of the ball, at which the others end: Auto-PGD on
    cross-entropy, targeted Auto-PGD on the ratio of logits over the nine likeliest wrong classes, Square, which has no
    gradient to be misled by. Three choices are ours, and ``faithful`` undoes the latter two. FAB is left out: it aims
    at the same boundaries as targeted Auto-PGD at several times the cost. The nine targets are probed for 20 steps and
    the nearest three attacked in full. Square leaves an image alone once its margin is too far from a wrong answer for
    what it still gains (``early_abandon=1.5``). On 500 MNIST images and the public robust LeNet5 the suite broke every
    image that a public AutoAttack with FAB broke (``results/autoattack.json``).

    Of label maps: the three runs of SEA (Croce et al. 2024), one per loss, so that the worst case of the mean IoU can
    be chosen among them, and Square (ours), which SEA lacks and ``faithful`` leaves out: without it, a masked gradient
    would pass for robustness.

    Args:
        eps: radius in pixel units.
        norm: ``inf`` or ``2``.
        queries: budget of Square per image; by default 5000, of label maps 1000 (ours).
        faithful: attack all nine targets in full, and let Square spend its whole budget on every image; of label maps,
            SEA alone.
        eot_samples: samples of a random model that each gradient is averaged over.
        task: what the labels mean.
        class_pixels: of label maps, the training pixels of each class
            (:func:`gambeson.evaluation.segmentation_suite.class_pixels`); None: those of the image itself.
    """
    ball = {"eps": eps, "norm": norm, "eot_samples": eot_samples}
    if queries is None:
        queries = 5000 if task.per_image_label else 1000
    if not task.per_image_label:
        sea: dict[str, ImageAttack] = dict(SEA(**ball).each(class_pixels))
        return sea if faithful else sea | {"square": Square(eps=eps, norm=norm, queries=queries)}
    square = Square(eps=eps, norm=norm, queries=queries, early_abandon=None if faithful else 1.5)
    return {
        "pgd": PGD(steps=10, shrink=0.06 if norm == "inf" else 0, **ball),
        "auto-pgd": AutoPGD(steps=100, **ball),
        "auto-pgd-targeted": TargetedAutoPGD(steps=100, probe_steps=None if faithful else 20, **ball),
        "square": square,
    }


def suite_for(data: Dataset, *, seed: int = 0, **settings: Any) -> dict[str, ImageAttack]:
    """Return :func:`standard_suite` for a data set: of its task and, for label maps, of its training pixels.

    Args:
        data: the data set.
        seed: of the sample in which the pixels of each class are counted.
        settings: of :func:`standard_suite`.
    """
    task = data.test.task
    pixels = None if task.per_image_label else class_pixels(data.train, seed=seed)
    return standard_suite(**settings, task=task, class_pixels=pixels)
