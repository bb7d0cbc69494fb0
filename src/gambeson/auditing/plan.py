"""What an audit will cost: its forwards and gradients, counted, and their time, measured on a few images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gambeson.auditing.suite import Suite
from gambeson.auditing.surrogate import choose
from gambeson.base import Config, UserError, seeded
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.universal import RANKED
from gambeson.victim import Victim

_ROW = 10 + 100 + 9 * 20 + 3 * 100
"""Gradients that the standard row takes of an image that never falls."""
_TRIALS = 8
"""Perturbations that the search of eps_uni crafts at the most, where the suite does not say."""
_ATTACKS = 20
"""Short attacks that diagnostics make on their sample, of as many steps as PGD or fewer."""
_BATCH, _TIMED = 32, 3


class Part(Config):
    """What one part of an audit asks of the model at the most: images sent forward, and images' gradients."""

    name: str
    forwards: int
    """Beside those that gradients begin with."""
    gradients: int


class AuditPlan(Config):
    """The expected cost of an audit. A perturbed image that has fallen costs no more, so that weak nets take less."""

    parts: tuple[Part, ...]
    seconds_a_forward: float
    """Of one image in a batch of 32: the median of three batches."""
    seconds_a_gradient: float
    """A forward and a backward of one image."""
    surrogate: str
    """The net that is trained first, whose time comes on top; empty: none."""
    device: str

    def seconds_of(self, part: Part) -> float:
        """Return how long a part takes at the most."""
        return part.forwards * self.seconds_a_forward + part.gradients * self.seconds_a_gradient

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds_of(part) for part in self.parts)


def plan(model: nn.Module, data: Dataset, suite: Suite, seed: int = 0) -> AuditPlan:
    """Count what an audit asks of a model and measure a few batches; the model comes back as it was.

    Args:
        model: from pixels to logits, on the device of the audit.
        data: with the splits of the audit.
        suite: how thorough.
        seed: of a random model's draws.

    Raises:
        UserError: a black box, whose cost is what it is asked: that is bounded by a budget.
    """
    if isinstance(model, BlackBox):
        raise UserError("the model is a black box, whose cost is what it is asked: bound that by --budget instead")
    suite = suite.on(data)
    few = data.train.sample(_BATCH, seed=seed)
    with Victim(model, fast=True) as victim, seeded(seed, "plan"):
        images, _ = few.take(slice(None), victim.device)
        random = victim.meet(images[:8]).stochastic

        def forward() -> None:
            with torch.no_grad():
                victim.exact(images)

        def gradient() -> None:
            point = images.clone().requires_grad_()
            victim.gradient(victim(point).logsumexp(1).sum(), point, len(images))

        times = [_median(work, victim.device) / len(images) for work in (forward, gradient)]
        device = str(victim.device)
    return AuditPlan(
        parts=_parts(suite, data, random),
        seconds_a_forward=times[0],
        seconds_a_gradient=times[1],
        surrogate=choose(suite, data)[0] or ("" if suite.surrogate in ("auto", "none") else suite.surrogate),
        device=device,
    )


def _median(work: Callable[[], None], device: torch.device) -> float:
    found = []
    for _ in range(_TIMED + 1):  # the first warms up
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def _parts(suite: Suite, data: Dataset, random: bool) -> tuple[Part, ...]:
    test = min(len(data.test), suite.test_images or len(data.test))
    held = min(len(data.validation), suite.validation_images or len(data.validation))
    sample, passes = min(suite.sample, len(data.test)), suite.draws if random else 1
    draws = suite.gradient_draws if random else 1
    attack = suite.universal(suite.eps[0])
    climb, screen = attack.steps * attack.batch_size, attack.screened * attack.screen_steps * attack.screen_batch
    screened = attack.screened * min(attack.screen_images, held)
    points, restarts = len(suite.eps), min(attack.restarts, attack.screened or attack.restarts)
    climbs = points * restarts + points - 1  # from the second eps on the eps before is one start more
    trials = _TRIALS if suite.eps_uni_runs is None else suite.eps_uni_runs
    ranked = suite.patterns_of_controls * min(RANKED, held) + 2 * held  # what stands for an eps is chosen on validation
    scored = test * (1 + suite.patterns_of_controls) + ranked
    row = min(suite.row_images, test) if data.test.labels.ndim == 1 and suite.norm != "1" else 0
    steps = suite.pgd_steps * suite.pgd_restarts
    return (
        Part(
            name="universal curve",
            forwards=passes * (points * (screened + scored) + climbs * held),
            gradients=points * screen + climbs * climb,
        ),
        Part(
            name="eps_uni",
            forwards=passes * (trials * (screened + 3 * held + test + ranked + trials * min(RANKED, held)) + 12 * test),
            gradients=trials * (screen + 2 * climb),
        ),
        Part(
            name="eps_adv",
            forwards=passes * sample * 2 * _TRIALS * suite.eps_adv,
            gradients=draws * sample * suite.pgd_steps * _TRIALS * suite.eps_adv,
        ),
        Part(name="PGD, image by image", forwards=passes * test, gradients=draws * test * steps),
        Part(name="row of attacks", forwards=passes * row * suite.row_queries, gradients=draws * row * _ROW),
        Part(
            name="transfer and noise",
            forwards=passes * (2 * suite.transfer_images + test * (1 + 3 * len(suite.noise_sizes))),
            gradients=0,
        ),
        Part(name="slopes", forwards=4 * suite.slope_backwards, gradients=3 * suite.slope_backwards),
        Part(
            name="diagnostics",
            forwards=passes * sample * (suite.queries + 100),
            gradients=draws * sample * _ATTACKS * min(20, suite.pgd_steps),
        ),
    )
