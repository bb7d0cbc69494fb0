"""Costs of an audit: upper bounds of what each stage asks of a model, and measured times of a few batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gambeson import models
from gambeson.auditing.amounts import Amounts, own_work
from gambeson.auditing.stages import adaptive, certified, own, surrogate
from gambeson.auditing.stages.corruption import NOISES
from gambeson.auditing.suite import Suite
from gambeson.base import Config, UserError, seeded
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.edits import PATTERNS
from gambeson.evaluation.universal import RANKED
from gambeson.victim import Victim
from gambeson.victim.temperature import IMAGES as CALIBRATED

RUNS = 6
"""Default maximum of perturbations crafted in the search of eps_uni of a black box."""
TRIALS = 8
"""The same where there are gradients."""
SUITE_GRADIENTS = 10 + 100 + 9 * 20 + 3 * 100
"""Gradients of the standard suite per image that is never broken."""
_MAP_SUITE = 3 * 300
"""The same of label maps."""
_BORROWED = 200 * 32
"""Gradients of a perturbation crafted on the surrogate."""
_TRANSFERRED = 11
"""Gradients of the surrogate per image that is perturbed on it."""
_BATCH, _TIMED, _PATIENCE = 32, 3, 1.0
"""Images, batches, and seconds that a time is measured with."""


class Part(Config):
    """Upper bounds for one stage of an audit: images forward, and image gradients."""

    name: str
    forwards: int
    """In addition to those of gradients."""
    gradients: int
    surrogate: int = 0
    """Gradients of the surrogate, those of its training included."""
    bounds: int = 0
    """Images whose accuracy is bounded from below."""


class Speed(Config):
    """Measured seconds per image."""

    forward: float
    gradient: float
    """A forward and a backward; 0 for a black box."""
    surrogate: float = 0.0
    """A gradient of the surrogate with respect to its weights."""
    bound: float = 0.0
    """Seconds per image whose accuracy is bounded from below."""
    random: bool = False
    """Whether the model is random, so that all is asked several times."""
    device: str = "cpu"

    def seconds(self, part: Part) -> float:
        """Return how long a part takes at the most."""
        own = part.forwards * self.forward + part.gradients * self.gradient
        return own + part.surrogate * self.surrogate + part.bounds * self.bound


class AuditPlan(Config):
    """The maximum cost of an audit. Adversarial images cost nothing more, so weak networks take less."""

    parts: tuple[Part, ...]
    speed: Speed
    surrogate: str
    """The net that is trained first; empty: none."""
    adaptive: Part
    """What attacks without the gradient would cost, which run only where the gradient turns out to be false: not among
    the parts."""
    notes: tuple[str, ...] = ()
    """What a limit on the time leaves out, as sentences."""

    def seconds_of(self, part: Part) -> float:
        """Return how long a part takes at the most."""
        return self.speed.seconds(part)

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds_of(part) for part in self.parts)


def measured(model: nn.Module, data: Dataset, suite: Suite, seed: int = 0) -> Speed:
    """Time a few batches; the model comes back as it was.

    Args:
        model: from pixels to logits, on the device of the audit; a black box is asked about some hundred images.
        data: with the splits of the audit.
        suite: names the surrogate.
        seed: of a random model's draws.
    """
    black_box, lent, bound = isinstance(model, BlackBox), 0.0, 0.0
    few = data.train.sample(_BATCH, seed=seed)
    with Victim(model, fast=not black_box) as victim, seeded(seed, "plan"):
        images, _ = few.take(slice(None), victim.device)
        victim.allow_no_graph, device = True, victim.device
        random = victim.inspect(images[:8], scores=black_box).stochastic

        def forward(images: torch.Tensor) -> None:
            with torch.no_grad():
                victim.forward_original(images)

        def gradient(images: torch.Tensor) -> None:
            point = images.clone().requires_grad_()
            victim.gradient(victim(point).logsumexp(1).sum(), point, len(images))

        ahead = _seconds(forward, images, device)
        back = 0.0 if black_box else _seconds(gradient, images, device)
        if name := surrogate.choose(suite, data)[0]:
            net = models.create(name, data).to(device)

            def step(images: torch.Tensor) -> None:
                net(images).logsumexp(1).sum().backward()

            lent = _seconds(step, images, device)
        elif suite.surrogate not in ("auto", "none"):  # one that is already trained: taken for as large as the model
            lent = back or 3 * ahead
    if suite.certified:
        began = time.perf_counter()
        certified.one_bound(model, data, max(suite.eps))
        bound = time.perf_counter() - began
    return Speed(forward=ahead, gradient=back, surrogate=lent, bound=bound, random=random, device=str(device))


def _seconds(work: Callable[[torch.Tensor], None], images: torch.Tensor, device: torch.device) -> float:
    """Return the median time per image of a few batches, which are smaller where a model is slow."""

    def once(count: int) -> float:
        began = time.perf_counter()
        work(images[:count])
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - began) / count

    once(2)  # warms up
    each = once(2)
    count = max(2, min(len(images), int(_PATIENCE / _TIMED / max(each, 1e-9))))
    times = [once(count)]
    while len(times) < _TIMED and sum(times) * count < _PATIENCE:
        times.append(once(count))
    return statistics.median(times)


def asked_parts(suite: Suite, data: Dataset, votes: int) -> tuple[Part, ...]:
    """Return upper bounds of the images queried by each stage of the audit of a black box.

    Args:
        suite: its settings.
        data: the data.
        votes: queries per scored image of a random black box.
    """
    test = min(suite.test_images or len(data.test), len(data.test))
    few, held = min(suite.pattern_images, len(data.train)), min(suite.pattern_images, len(data.validation))
    sample = min(suite.sample, test)
    controls, runs = suite.patterns_of_controls, RUNS if suite.eps_uni_runs is None else suite.eps_uni_runs
    craft = 2 * (suite.patterns * few + 3 * held) + 2 * held + test
    craft += (controls + 2) * held  # what stands for an eps is chosen on validation
    search = runs * (craft + held) + (runs * len(suite.eps) + runs * (runs - 1) // 2) * held
    search += 24 * test if runs else 0  # the error curve near eps_uni
    transferred = min(suite.transfer_images, test) if suite.surrogate != "none" else 0
    checked = 2 * test + 23 * sample + 600
    checked += 0 if votes == 1 else 2 * sample  # of a random box: votes that choose the worst candidates
    asked = {
        "start": votes * test + 20,
        "universal curve": votes * len(suite.eps) * (craft + controls * test),
        "per image": sample * (suite.queries + 1),
        "eps_uni": votes * search,
        "transfer": votes * (test + 2 * transferred) if transferred else 0,
        "noise": votes * len(NOISES) * len(suite.noise_sizes) * test,
        "edits": votes * _edited(suite, test),
        "classes": votes * 2 * test * (len(data.classes) == 2),
        "diagnostics": votes * checked,
    }
    lent = _lent(suite, data)
    asked |= {"surrogate": 0} if lent else {}
    return tuple(
        Part(name=name, forwards=count, gradients=0, surrogate=lent.get(name, 0)) for name, count in asked.items()
    )


def _edited(suite: Suite, test: int) -> int:
    """Images that are scored under edits: clean, perturbed and under controls, without an edit too."""
    return min(suite.edit_images, test) * (len(suite.edits) + 1) * (2 + PATTERNS) if suite.edits else 0


def _class_wise(suite: Suite) -> int:
    """Gradients of class-wise crafting."""
    attack = suite.class_wise_attack(suite.eps[0])
    return suite.class_wise * attack.restarts * attack.steps * attack.batch_size


def most_images(suite: Suite, data: Dataset, votes: int) -> int:
    """Return an upper bound of the images queried by the audit of a black box; see :func:`asked_parts`."""
    return sum(part.forwards for part in asked_parts(suite, data, votes))


def _lent(suite: Suite, data: Dataset) -> dict[str, int]:
    """Gradients of the surrogate, by stage."""
    name, reason = surrogate.choose(suite, data)
    if reason:
        return {}
    trained = surrogate.schedule(name, suite, data) if name else None
    few = min(suite.transfer_images, suite.test_images or len(data.test), len(data.test))
    return {
        "surrogate": 0 if trained is None else trained.images * trained.epochs + len(data.test),
        "universal curve": _BORROWED,
        "transfer": few * _TRANSFERRED,
        "diagnostics": min(suite.sample, len(data.test)) * _TRANSFERRED,
    }


def parts_of(
    suite: Suite, data: Dataset, *, random: bool = False, ran: Collection[str] = (), mine: Iterable[Any] = ()
) -> tuple[Part, ...]:
    """Return upper bounds of what each stage of an audit costs, in the order of an audit that has a limit on its time.

    Args:
        suite: its settings, with its grid of eps.
        data: the data.
        random: whether the model is random.
        ran: checks that have run.
        mine: attacks of the user's own.
    """
    n = Amounts(suite, data, random)
    test, held, votes = n.test, n.held, n.votes
    attack = suite.universal(suite.eps[0])
    run = attack.steps * attack.batch_size
    screen = attack.probe_starts * attack.probe_start_steps * attack.probe_start_batch
    probe_starts = attack.probe_starts * min(attack.probe_start_images, held)
    points, restarts = len(suite.eps), min(attack.restarts, attack.probe_starts or attack.restarts)
    runs = points * restarts + points - 1  # from the second eps on the eps before is one start more
    inner = suite.inside(suite.eps[0])
    more, inside = (2, inner.steps * inner.batch_size) if inner else (0, 0)  # two starts inside the ball
    trials = TRIALS if suite.eps_uni_runs is None else suite.eps_uni_runs
    ranked = suite.patterns_of_controls * min(RANKED, held) + 2 * held  # what stands for an eps is chosen on validation
    scored = test * (2 + suite.patterns_of_controls) + ranked  # the crafted one too, where another was chosen
    search = trials * (probe_starts + 3 * held + test + ranked + trials * min(RANKED, held)) + 24 * test * bool(trials)
    attacked = min(suite.suite_images, test) if suite.norm != "1" else 0
    gradients, queries = (_MAP_SUITE, 1000) if n.of_maps else (SUITE_GRADIENTS, suite.suite_queries)
    jacobians = 0 if n.of_maps else suite.jacobian_backwards
    aims = 2 * suite.targeted * n.of_maps
    sets = (1 + bool(attacked) + n.of_maps + bool(n.targeted)) * suite.rescoring
    searched = n.sample * TRIALS * suite.eps_adv
    views = 2 * test * (len(data.classes) == 2) + (test + 2 * held) * suite.class_wise
    bounded = min(certified.IMAGES, test) * suite.certified
    asked, backward = n.checks(ran)
    added = [own_work(one, n) for one in mine]
    found = {
        "start": (votes * test + min(CALIBRATED, held), 0),
        "surrogate": (0, 0),
        "randomness": ((votes + 1) * test * random, 0),
        "universal NES": (suite.universal_queries + votes * held * bool(suite.universal_queries), 0),
        "universal curve": (
            votes * (points * (probe_starts + scored + (more + bool(suite.universal_queries)) * held) + runs * held),
            points * (screen + more * inside) + runs * run,
        ),
        "re-scoring": (votes * n.again * suite.rescoring, 0),
        "PGD, image by image": (
            votes * (test * (1 + 4 * n.of_maps) + sets * n.again),
            n.draws * test * (n.pgd + n.cospgd),
        ),
        "targeted Auto-PGD": (n.targeted_forwards, test * n.targeted),
        "attack suite": (votes * attacked * (queries + 3), n.draws * attacked * gradients),
        "diagnostics": (votes * asked, backward),
        "transfer": (votes * (2 * min(suite.transfer_images, test) + test) * bool(_lent(suite, data)), 0),
        "eps_uni": (votes * search, trials * (screen + 2 * run)),
        "eps_adv": (votes * 2 * searched, n.draws * suite.pgd_steps * searched),
        "targets": (votes * aims * (test * (3 + suite.patterns_of_controls) + held), aims * (screen + run)),
        "own attacks": (sum(ahead for ahead, _ in added), sum(back for _, back in added)),
        "noise": (votes * test * len(NOISES) * len(suite.noise_sizes), 0),
        "edits": (votes * _edited(suite, test), 0),
        "classes": (votes * views, _class_wise(suite)),
        "certified": (votes * points * bounded, 0),
        "Jacobian analysis": (4 * jacobians, 3 * jacobians),
    }
    lent = _lent(suite, data)
    return tuple(
        Part(
            name=name,
            forwards=ahead,
            gradients=back,
            surrogate=lent.get(name, 0),
            bounds=points * bounded * (name == "certified"),
        )
        for name, (ahead, back) in found.items()
    )


def adaptive_part(suite: Suite, data: Dataset, *, random: bool = False) -> Part:
    """Return an upper bound of what attacks without the gradient cost, which only a false gradient calls for."""
    n, lent = Amounts(suite, data, random), _lent(suite, data).get("surrogate", 0)
    attack, steps = suite.universal(suite.eps[0]), adaptive.STEPS
    shared = min(adaptive.SHARED_STEPS, attack.steps) * adaptive.SHARED_BATCH
    copied = min(suite.surrogate_images, len(data.train)) if lent else 0
    probed = n.sample * (adaptive.PROBES + 1) * suite.queries
    return Part(
        name="adaptive attacks",
        forwards=n.votes * (copied + n.test + n.again)
        + n.draws * (probed + n.sample * steps + 2 * adaptive.SHARED * shared),
        gradients=n.draws * n.sample * (steps + n.pgd + n.white),
        surrogate=lent + n.sample * steps,
    )


def plan(
    model: nn.Module,
    data: Dataset,
    suite: Suite,
    seed: int = 0,
    speed: Speed | None = None,
    *,
    attacks: Sequence[Any] = (),
) -> AuditPlan:
    """Count what an audit asks of a model and measure a few batches; the model comes back as it was.

    Args:
        model: from pixels to logits, on the device of the audit.
        data: with the splits of the audit.
        suite: how thorough.
        seed: of a random model's draws.
        speed: of the model, if measured.
        attacks: the user's own, beside those that the suite names.

    Raises:
        UserError: a black box, whose cost is what it is asked: that is bounded by a budget.
    """
    if isinstance(model, BlackBox):
        raise UserError("the model is a black box, whose cost is the number of queries: limit it with --budget instead")
    suite = suite.on(data)
    surrogate.check(suite, data, model)
    certified.check(suite, data, model)
    speed = speed or measured(model, data, suite, seed)
    mine = [one.attack for one in own.of(suite, attacks).values()]
    found = surrogate.choose(suite, data)[0] or ("" if suite.surrogate in ("auto", "none") else suite.surrogate)
    return AuditPlan(
        parts=parts_of(suite, data, random=speed.random, mine=mine),
        speed=speed,
        surrogate=found,
        adaptive=adaptive_part(suite, data, random=speed.random),
    )
