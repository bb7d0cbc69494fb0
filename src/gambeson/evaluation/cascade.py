"""Attacks in a row, from cheap to strong: an image that has fallen is left alone, and the worst case counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from gambeson.base import Config, derive, task
from gambeson.data import Split
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import Cost
from gambeson.evaluation.universal import at_once
from gambeson.victim import DRAWS, Victim


class ImageAttack(Protocol):
    """Anything that perturbs images one by one, as the attacks of :mod:`gambeson.attacks` do."""

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, ignore_index: int | None = None
    ) -> torch.Tensor:
        """Return perturbed images in the shape of ``x``."""
        ...


class Round(Config):
    """What one attack of the row did."""

    attack: str
    tried: int
    """Images that stood before it."""
    broken: int
    """Images that it broke."""
    accuracy: Rate
    """Share of all images that are still right after it."""
    cost: Cost


class CascadeResult(Config):
    """Accuracy under the worst of several attacks, image by image."""

    clean: Rate
    """Accuracy on clean images."""
    robust: Rate
    """Share of images that are right when clean and that no attack broke."""
    success: Rate
    """Share of the images right when clean that some attack broke."""
    draws: int = 1
    """Draws that decided each image by their majority: more than one for a random model."""
    rounds: list[Round]
    largest: float
    """Largest norm of a perturbation that broke an image, as measured on the stored images."""
    mean: float
    """Mean norm of these."""


@dataclass(frozen=True)
class Cascade:
    """A finished row of attacks."""

    result: CascadeResult
    images: torch.Tensor
    """The images, those that fell replaced by what broke them: scoring these gives ``result.robust`` exactly."""
    fallen_to: torch.Tensor
    """Index of the attack that broke each image; -1 none, -2 wrong when clean."""


def run_cascade(
    victim: Victim,
    split: Split,
    attacks: Mapping[str, ImageAttack],
    *,
    norm: str = "inf",
    seed: int = 0,
    batch_size: int = 250,
) -> Cascade:
    """Attack every image with each attack in turn until one breaks it.

    Success is decided on the model itself, by the images an attack returned, whatever the attack believed; on a random
    model by the majority of :data:`gambeson.victim.DRAWS` fresh draws.

    Args:
        victim: the model, inside its context.
        split: images with one label each.
        attacks: by name, cheapest first.
        norm: of the distances that are reported.
        seed: of every attack.
        batch_size: images at a time, at most: fewer where they are large.
    """
    images, labels = split.take(slice(None), victim.device)
    batch_size, ignore = at_once(split, batch_size), split.ignore_index
    standing = torch.cat([still_right(victim, *part) for part in _parts(images, labels, batch_size)])
    clean = Rate.of(int(standing.sum()), len(images))
    fallen_to = torch.where(standing, -1, -2)
    stored, rounds = images.clone(), []
    with task("  attacks in a row", len(attacks)) as advance:
        for k, (name, attack) in enumerate(attacks.items()):
            before, rows = (victim.forwards, victim.backwards), standing.nonzero().flatten()
            for j, part in enumerate(rows.split(batch_size)):
                moved = attack(victim, images[part], labels[part], seed=derive(seed, name, j), ignore_index=ignore)
                fell = part[~still_right(victim, moved, labels[part])]
                stored[fell] = moved[torch.isin(part, fell)]
                standing[fell] = False
                fallen_to[fell] = k
            cost = Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1])
            rounds.append(
                Round(
                    attack=name,
                    tried=len(rows),
                    broken=len(rows) - int(standing.sum()),
                    accuracy=Rate.of(int(standing.sum()), len(images)),
                    cost=cost,
                )
            )
            advance()
    distances = (stored - images).flatten(1).norm(p=float(norm), dim=1)[fallen_to >= 0]
    right = int((fallen_to != -2).sum())
    result = CascadeResult(
        clean=clean,
        robust=Rate.of(int(standing.sum()), len(images)),
        success=Rate.of(right - int(standing.sum()), right),
        draws=_draws(victim, images),
        rounds=rounds,
        largest=float(distances.max()) if len(distances) else 0.0,
        mean=float(distances.mean()) if len(distances) else 0.0,
    )
    return Cascade(result=result, images=stored.cpu(), fallen_to=fallen_to.cpu())


def _parts(images: torch.Tensor, labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def still_right(victim: Victim, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return whether the model itself gets each image right (N,); a random one by the majority of many passes."""
    draws = _draws(victim, images)
    hits = torch.stack([victim.exact(images).argmax(1) == labels for _ in range(draws)]).sum(0)
    return 2 * hits > draws


def _draws(victim: Victim, images: torch.Tensor) -> int:
    return DRAWS if victim.meet(images, scores=True).stochastic else 1
