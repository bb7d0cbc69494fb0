"""Outcomes of per-image attacks: correct predictions per image, from which accuracies are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn

from gambeson.attacks import GradientAttack
from gambeson.attacks.registry import require_attack
from gambeson.base import UserError, derive, eps_text, seeded, user_code
from gambeson.base.checks import TOLERANCE
from gambeson.data import Split
from gambeson.evaluation.universal import scored
from gambeson.tasks import Counts, Rate, Task
from gambeson.threat import Ball
from gambeson.victim import EOT_SAMPLES, Victim, auto_batch_size, nothing_counts, score_batches, vote


class ImageAttack(Protocol):
    """A per-image attack, as those of :mod:`gambeson.attacks`."""

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images in the shape of ``x``."""
        ...


@scored
def outcome(
    victim: Victim,
    split: Split,
    attack: ImageAttack,
    seed: int,
    batch_size: int = 250,
    keep: Callable[[torch.Tensor], object] | None = None,
) -> Counts:
    """Attack every image; what is right is decided here, on the images that the attack returned.

    On a random model a gradient attack averages over :data:`EOT_SAMPLES` samples unless it sets a number, and the
    majority of votes decides (:func:`gambeson.victim.votes_of`).

    Args:
        victim: the model, inside its context.
        split: the images.
        attack: a per-image attack.
        seed: of the attack and of a random model's votes.
        batch_size: maximum batch size; smaller for large images.
        keep: is given the perturbed images of each batch.

    Raises:
        UserError: some logits are not finite, or no label of the split counts.
    """
    if len(split) == 0:
        raise nothing_counts(split)
    attack = averaged(attack, victim, split.take(slice(0, 8), victim.device)[0])
    right, total = [], []
    with seeded(seed, "score"):
        for k, (images, labels) in enumerate(split.batches(at_once(split, batch_size), device=victim.device)):
            moved = attacked(attack, victim, images, labels, seed=derive(seed, "batch", k), task=split.task)
            found = split.task.counts(vote(victim, moved), labels)
            if keep is not None:
                keep(moved)
            right.append(found.right.cpu())
            total.append(found.total.cpu())
    return _counted(Counts(torch.cat(right), torch.cat(total)), split)


@scored
def outcome_under(victim: Victim, split: Split, delta: torch.Tensor, *, seed: int = 0) -> Counts:
    """Count what one perturbation (1, C, H, W) leaves right of a split, as :func:`gambeson.victim.predict` does."""
    return score_batches(victim, split, delta.to(victim.device), seed=seed).counts


def accuracy_under(
    victim: nn.Module | Victim, split: object, attack: ImageAttack, seed: int, batch_size: int = 250
) -> Rate:
    """Accuracy under a per-image attack; arguments and errors are those of :func:`outcome`."""
    return outcome(victim, split, attack, seed, batch_size).accuracy


def attacked(
    attack: ImageAttack,
    victim: Victim,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    task: Task,
    name: str = "",
) -> torch.Tensor:
    """Run an attack on a batch and return what :func:`checked` accepts.

    Raises:
        UserError: as :func:`checked`; or it is no attack, it changes the images it is given, or it is in a user's file
            and raises, with the line.
    """
    if require_attack(attack) != "image":
        raise UserError(f"{type(attack).__name__} makes one perturbation for all images: craft it, and score that")
    before = images._version
    with user_code.blamed(attack, f"the attack {name or type(attack).__name__!r}"):
        moved = attack(victim, images, labels, seed=seed, task=task)
    if images._version != before:
        raise UserError(
            f"attack {name or type(attack).__name__!r} changes the images it is given: let it work on x.clone()"
        )
    return checked(moved, images, attack, name)


def checked(moved: torch.Tensor, images: torch.Tensor, attack: object, name: str = "") -> torch.Tensor:
    """Return what an attack returned, once it is known to be a perturbation of its images that the attack may make.

    Args:
        moved: what it returned for ``images``.
        images: (N, C, H, W) in [0, 1].
        attack: if it has an ``eps`` and a ``norm`` that :class:`gambeson.threat.Ball` takes, no image may lie outside
            that ball.
        name: of the attack, for the error; by default that of its class.

    Raises:
        UserError: no tensor, another shape or type, pixels that are not finite or outside [0, 1], or outside the ball.
    """
    name = name or type(attack).__name__
    if not isinstance(moved, torch.Tensor):
        raise UserError(f"attack {name!r} returned a {type(moved).__name__}: expected a tensor of perturbed images")
    if moved.shape != images.shape or moved.dtype != images.dtype:
        raise UserError(
            f"attack {name!r} returned {moved.dtype} of shape {tuple(moved.shape)}: expected those of its images, "
            f"{images.dtype} of shape {tuple(images.shape)}"
        )
    low, high = (float(bound) for bound in torch.aminmax(moved))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise UserError(
            f"attack {name!r} returned pixels from {low:.4g} to {high:.4g}: expected finite ones in [0, 1]; clip them"
        )
    ball = ball_of(attack)
    if ball is not None:
        largest = float(ball.length((moved - images).double()).max())
        if largest > ball.limit:
            raise UserError(
                f"attack {name!r} of eps = {eps_text(ball.eps)} moved an image by {largest:.4g} in the norm "
                f"{ball.norm}: expected every image inside its ball; project the perturbation"
            )
    return moved


def ball_of(attack: object) -> Ball | None:
    """Return the ball that an attack names, in whatever spelling a user's own has; None if it names none."""
    eps, norm = getattr(attack, "eps", None), getattr(attack, "norm", None)
    if eps is None or norm is None:
        return None
    try:
        return Ball(eps=eps, norm=norm)
    except UserError:  # several radii, or another norm
        return None


def _counted(counts: Counts, split: Split) -> Counts:
    if counts.images == 0:
        raise nothing_counts(split)
    return counts


AttackT = TypeVar("AttackT", bound=ImageAttack)


def averaged(attack: AttackT, victim: Victim, images: torch.Tensor, samples: int = EOT_SAMPLES) -> AttackT:
    """Return the attack adapted to a model: for a random one, with gradients averaged over several samples.

    Args:
        attack: any attack; others than gradient attacks, and those that set ``eot_samples``, are returned unchanged.
        victim: the model, inside its context.
        images: (N, C, H, W), to inspect the model with if it has not been inspected.
        samples: number of samples.
    """
    if (
        isinstance(attack, GradientAttack)
        and attack.eot_samples is None
        and victim.inspect(images, scores=True).stochastic
    ):
        return attack.model_copy(update={"eot_samples": samples})
    return attack


def at_once(split: Split, most: int = 250) -> int:
    """Return the batch size for attacks on a split: 250 images of 32 pixels, 170 of 64 in colour, 13 of 224."""
    return auto_batch_size(split.shape, most, 2**21)
