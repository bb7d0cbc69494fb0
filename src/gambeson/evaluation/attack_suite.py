"""Attack suites: the worst case per image over several attacks, scored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gambeson.attacks import PGD, AutoPGD, Square, TargetedAutoPGD
from gambeson.base import Config, derive, seeded, task
from gambeson.data import Split
from gambeson.evaluation.outcome import ImageAttack, at_once, attacked
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.universal import scored
from gambeson.tasks import Rate
from gambeson.threat import Norm
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
    """Accuracy under the worst of several attacks per image.

    The worst case is decided per image, by a procedure fixed beforehand. The correct images are therefore one binomial
    count, and ``robust`` has the interval of a single rate for any number of attacks.
    """

    clean: Rate
    """Accuracy on clean images."""
    robust: Rate
    """Accuracy under the worst of the attacks, including the clean image."""
    success: Rate
    """Attack success rate on images that are correct when clean; for a random model the net loss, because some images
    change between two counts by chance."""
    votes: int = 1
    """Votes per image: more than one for a random model."""
    rounds: list[AttackRound]
    largest: float
    """Largest norm of a successful perturbation, measured on the stored images."""
    mean: float
    """Mean norm of these."""


@dataclass(frozen=True)
class SuiteRun:
    """A finished suite of attacks."""

    result: SuiteResult
    images: torch.Tensor
    """The worst candidate of each image, or the clean image: scoring these with the seed of the suite gives
    ``result.robust`` exactly."""
    broken_by: torch.Tensor
    """Index of the attack that broke each image; -1 none, -2 wrong without an attack, -3 its label does not count."""


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
        self._support = torch.zeros_like(self.labels)
        self.source = torch.full_like(self.labels, -1)
        for rows in torch.arange(len(self.labels), device=self.labels.device).split(self.batch_size):
            self._support[rows] = self._votes(self.images[rows], rows, "clean")

    @property
    def survivors(self) -> torch.Tensor:
        """Indices of the images still to be attacked: they count, and are not broken for good."""
        return (self.counts & (self._support > SURE * self.votes)).nonzero().flatten()

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
            counts = now.task.counts(predict(self.victim, now, seed=self.seed), now.labels.cpu())
        return counts.right.to(self.labels.device) > 0

    def rate(self, right: torch.Tensor) -> Rate:
        """Return the share of ``right`` (N,) among the images that count."""
        return Rate.of(int(right.sum()), int(self.counts.sum()))

    def _votes(self, images: torch.Tensor, rows: torch.Tensor, source: int | str) -> torch.Tensor:
        with seeded(self.seed, "candidate", source, int(rows[0])):
            return votes_right(self.victim, images, self.labels[rows], self.split.task)


@scored
def run_suite(
    victim: Victim,
    split: Split,
    attacks: Mapping[str, ImageAttack],
    *,
    norm: str = "inf",
    seed: int = 0,
    batch_size: int = 250,
) -> SuiteRun:
    """Attack every image with each attack in turn until one breaks it, and score the worst case of each image once.

    Success is decided on the model itself, by the images an attack returned, not by the attack. For a random model,
    decided by the majority of votes (:func:`gambeson.victim.votes_of`), the candidate with the fewest correct votes is
    kept, and only that one is scored, on fresh votes: see :class:`WorstCase`.

    Args:
        victim: the model, inside its context.
        split: images with one label each.
        attacks: by name, cheapest first.
        norm: of the reported distances.
        seed: of every attack, and of a random model's votes.
        batch_size: maximum batch size; smaller for large images.

    Raises:
        UserError: labels are not one per image, no label counts, some logits are not finite, or an attack does not
            return images.
    """
    worst = WorstCase(victim, split, seed=seed, batch_size=batch_size)
    clean_images = worst.images.clone()
    clean = right = worst.right()
    rounds = []
    with task("  attack suite", len(attacks)) as advance:
        for k, (name, attack) in enumerate(attacks.items()):
            before, rows = (victim.forwards, victim.backwards), worst.survivors
            for j, part in enumerate(rows.split(worst.batch_size) if len(rows) else ()):
                x, y, stream = clean_images[part], worst.labels[part], derive(seed, name, j)
                with seeded(stream, "attack"):  # for an attack, or a model, that draws from torch's own generators
                    moved = attacked(attack, victim, x, y, seed=stream, task=split.task, name=name)
                worst.offer(part, moved, k)
            right = worst.right()
            rounds.append(
                AttackRound(
                    attack=name,
                    tried=len(rows),
                    broken=len(rows) - len(worst.survivors),
                    accuracy=worst.rate(right),
                    cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
                )
            )
            advance()
    broken = clean & ~right & (worst.source >= 0)
    broken_by = torch.where(broken, worst.source, torch.where(right, -1, -2)).masked_fill(~worst.counts, -3)
    distances = (worst.images - clean_images).flatten(1).norm(p=float(norm), dim=1)[broken]
    before_all, left = int(clean.sum()), int(right.sum())
    result = SuiteResult(
        clean=worst.rate(clean),
        robust=worst.rate(right),
        success=Rate.of(max(0, before_all - left), before_all),
        votes=worst.votes,
        rounds=rounds,
        largest=float(distances.max()) if len(distances) else 0.0,
        mean=float(distances.mean()) if len(distances) else 0.0,
    )
    return SuiteRun(result=result, images=worst.images.cpu(), broken_by=broken_by.cpu())


def standard_suite(
    *, eps: float | str, norm: Norm = "inf", queries: int = 5000, faithful: bool = False, eot_samples: int | None = None
) -> dict[str, ImageAttack]:
    """Return the attacks of the standard suite, to be run by :func:`gambeson.evaluation.run_suite`.

    The members of AutoAttack's standard version (Croce and Hein 2020, section 6) without FAB, behind a short PGD that
    takes what is easy: Auto-PGD on cross-entropy, targeted Auto-PGD on the ratio of logits over the nine likeliest
    wrong classes, Square, which has no gradient to be misled by. Three choices are ours, and ``faithful`` undoes the
    latter two. FAB is left out: it aims at the same boundaries as targeted Auto-PGD at several times the cost. The
    nine targets are probed for 20 steps and the nearest three attacked in full. Square leaves an image alone once its
    margin is too far from a wrong answer for what it still gains (``early_abandon=3``). On 500 MNIST
    images and the public robust LeNet5 the row broke every image that a public AutoAttack with FAB broke
    (``results/autoattack.json``).

    Args:
        eps: radius in pixel units.
        norm: ``inf`` or ``2``.
        queries: budget of Square per image.
        faithful: attack all nine targets in full, and let Square spend its whole budget on every image.
        eot_samples: samples of a random model that each gradient is averaged over.
    """
    ball = {"eps": eps, "norm": norm, "eot_samples": eot_samples}
    return {
        "pgd": PGD(steps=10, **ball),
        "auto-pgd": AutoPGD(steps=100, **ball),
        "auto-pgd-targeted": TargetedAutoPGD(steps=100, probe_steps=None if faithful else 20, **ball),
        "square": Square(eps=eps, norm=norm, queries=queries, early_abandon=None if faithful else 3),
    }
