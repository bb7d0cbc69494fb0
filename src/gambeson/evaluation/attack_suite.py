"""A suite of attacks, from cheap to strong: each image's worst case over them, scored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gambeson.attacks import PGD, AutoPGD, Square, TargetedAutoPGD
from gambeson.base import Config, UserError, derive, seeded, task
from gambeson.base.checks import TOLERANCE
from gambeson.data import Split
from gambeson.evaluation.outcome import ImageAttack, at_once
from gambeson.evaluation.rates import Cost
from gambeson.tasks import Rate
from gambeson.threat import Norm
from gambeson.victim import Victim, nothing_counts, predict, votes_of, votes_right

SURE = 0.25
"""Share of right votes up to which an image counts as broken for good while a random model is attacked, and later
attacks leave it alone (ours): were half of all its passes right, so few of 21 votes would be once in 75 times."""


class AttackRound(Config):
    """What one attack of the suite did."""

    attack: str
    tried: int
    """Images that it was tried on: all that no attack before it had broken for good."""
    broken: int
    """Images that it broke for good: of a random model, those with at most :data:`SURE` of their votes right."""
    accuracy: Rate
    """Share of all images that are still right after it: an image under the worst of the attacks so far is decided as
    everywhere, of a random model by the majority of fresh votes, which no choice was made by."""
    cost: Cost


class SuiteResult(Config):
    """Accuracy under the worst of several attacks, image by image.

    What is right under the worst case is decided for each image by itself, by a procedure that is fixed before the
    images are looked at. The images right are therefore one binomial count, and ``robust`` has the interval of a
    single rate, however many attacks there are.
    """

    clean: Rate
    """Accuracy on clean images."""
    robust: Rate
    """Share of images that are right under the worst of the attacks, the clean image included."""
    success: Rate
    """Share of the images right when clean that the attacks took from the model: of a random model the net loss, for
    some images are right in one count and wrong in the next by chance alone."""
    votes: int = 1
    """Votes that decided each image by their majority: more than one for a random model."""
    rounds: list[AttackRound]
    largest: float
    """Largest norm of a perturbation that broke an image, as measured on the stored images."""
    mean: float
    """Mean norm of these."""


@dataclass(frozen=True)
class SuiteRun:
    """A finished suite of attacks."""

    result: SuiteResult
    images: torch.Tensor
    """The images, each as the attack left it that did it most harm, or clean where none did any: scoring these with
    the seed of the suite gives ``result.robust`` exactly."""
    fallen_to: torch.Tensor
    """Index of the attack that broke each image; -1 none, -2 wrong without an attack, -3 its label does not count."""


class WorstCase:
    """The worst candidate seen of each image of a split, the clean image being the first.

    How bad a candidate is, its votes say (:func:`gambeson.victim.votes_right`), which are drawn for that choice alone.
    A choice by votes favours candidates that were unlucky, so that the chosen ones are scored on other votes
    (:meth:`right`): those that the clean images are scored on, with the same seed. A candidate that does no more harm
    than the clean image, however often it is tried, then changes the number by no more than the sampling error of one
    count; the clean image itself, tried as a candidate, changes nothing at all. A model that repeats itself is not
    asked again: its one vote says what every other would.

    Args:
        victim: the model, inside its context.
        split: images with one label each.
        seed: of a random model's votes.
        batch_size: images at a time, at most: fewer where they are large.

    Attributes:
        images: (N, C, H, W), the worst candidates, on the model's device.
        source: (N,) which candidate each is: -1 the clean image, else what :meth:`offer` was told.
        votes: passes that decide an image.

    Raises:
        UserError: there is not one label per image, no label counts, or some logits are not finite.
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
        self._random = victim.inspect(self.images, scores=True).stochastic
        self._support = torch.zeros_like(self.labels)
        self.source = torch.full_like(self.labels, -1)
        for rows in torch.arange(len(self.labels), device=self.labels.device).split(self.batch_size):
            self._support[rows] = self._votes(self.images[rows], rows, "clean")

    @property
    def standing(self) -> torch.Tensor:
        """Numbers of the images that are worth attacking further: they count, and are not broken for good."""
        return (self.counts & (self._support > SURE * self.votes)).nonzero().flatten()

    def offer(self, rows: torch.Tensor, moved: torch.Tensor, source: int) -> None:
        """Keep candidates ``moved`` of the images numbered ``rows`` where they do more harm than what was kept."""
        support = self._votes(moved, rows, source)
        worse = support < self._support[rows]
        rows = rows[worse]
        self.images[rows], self._support[rows], self.source[rows] = moved[worse], support[worse], source

    def right(self) -> torch.Tensor:
        """Return which images are right (N,), the worst candidate of each being scored on votes of its own."""
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

    Success is decided on the model itself, by the images an attack returned, whatever the attack believed. Of a random
    model, decided by the majority of its votes (:func:`gambeson.victim.votes_of`), the candidate with the fewest right
    votes is kept, and only that one scored, on fresh votes: see :class:`WorstCase`.

    Args:
        victim: the model, inside its context.
        split: images with one label each.
        attacks: by name, cheapest first.
        norm: of the distances that are reported.
        seed: of every attack, and of a random model's votes.
        batch_size: images at a time, at most: fewer where they are large.

    Raises:
        UserError: there is not one label per image, no label counts, some logits are not finite, or an attack returns
            something other than images.
    """
    worst = WorstCase(victim, split, seed=seed, batch_size=batch_size)
    clean_images = worst.images.clone()
    clean = right = worst.right()
    rounds = []
    with task("  attack suite", len(attacks)) as advance:
        for k, (name, attack) in enumerate(attacks.items()):
            before, rows = (victim.forwards, victim.backwards), worst.standing
            for j, part in enumerate(rows.split(worst.batch_size) if len(rows) else ()):
                x, y, stream = clean_images[part], worst.labels[part], derive(seed, name, j)
                with seeded(stream, "attack"):  # for an attack, or a model, that draws from torch's own generators
                    moved = attack(victim, x, y, seed=stream, task=split.task)
                worst.offer(part, _checked(moved, x, name), k)
            right = worst.right()
            rounds.append(
                AttackRound(
                    attack=name,
                    tried=len(rows),
                    broken=len(rows) - len(worst.standing),
                    accuracy=worst.rate(right),
                    cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
                )
            )
            advance()
    broken = clean & ~right & (worst.source >= 0)
    fallen_to = torch.where(broken, worst.source, torch.where(right, -1, -2)).masked_fill(~worst.counts, -3)
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
    return SuiteRun(result=result, images=worst.images.cpu(), fallen_to=fallen_to.cpu())


def _checked(moved: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    if moved.shape != x.shape:
        raise UserError(
            f"attack {name!r} returned shape {tuple(moved.shape)}: expected that of its images, {tuple(x.shape)}"
        )
    low, high = (float(bound) for bound in torch.aminmax(moved))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise UserError(
            f"attack {name!r} returned pixels from {low:.4g} to {high:.4g}: expected finite ones in [0, 1]; clip them"
        )
    return moved


def standard_suite(
    *, eps: float | str, norm: Norm = "inf", queries: int = 5000, faithful: bool = False, eot_samples: int | None = None
) -> dict[str, ImageAttack]:
    """Return the attacks of the standard suite, to be run by :func:`gambeson.evaluation.run_suite`.

    The members of AutoAttack's standard version (Croce and Hein 2020, section 6) without FAB, behind a short PGD that
    takes what is easy: Auto-PGD on cross-entropy, targeted Auto-PGD on the ratio of logits over the nine likeliest
    wrong classes, Square, which has no gradient to be misled by. Three choices are ours, and ``faithful`` undoes the
    latter two. FAB is left out: it aims at the same boundaries as targeted Auto-PGD at several times the cost. The
    nine targets are scouted for 20 steps and the nearest three climbed in full. Square leaves an image alone once its
    margin is too far from a wrong answer for what it still gains (``early_abandon=3``). On 500 MNIST
    images and the public robust LeNet5 the row broke every image that a public AutoAttack with FAB broke
    (``results/autoattack.json``).

    Args:
        eps: radius in pixel units.
        norm: ``inf`` or ``2``.
        queries: budget of Square, an image.
        faithful: climb towards all nine targets in full, and let Square spend its whole budget on every image.
        eot_samples: of a random model, over which each gradient is averaged.
    """
    ball = {"eps": eps, "norm": norm, "eot_samples": eot_samples}
    return {
        "pgd": PGD(steps=10, **ball),
        "auto-pgd": AutoPGD(steps=100, **ball),
        "auto-pgd-targeted": TargetedAutoPGD(steps=100, probe_steps=None if faithful else 20, **ball),
        "square": Square(eps=eps, norm=norm, queries=queries, early_abandon=None if faithful else 3),
    }
