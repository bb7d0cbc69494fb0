"""Costs of an audit: upper bounds of what each stage asks of a model, and measured times of a few batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gambeson import models
from gambeson.attacks import PGD, TargetedAutoPGD
from gambeson.auditing.rescoring import MOST
from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.corruption import NOISES
from gambeson.auditing.suite import Suite
from gambeson.base import Config, UserError, seeded
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.edits import PATTERNS
from gambeson.evaluation.outcome import at_once
from gambeson.evaluation.universal import RANKED
from gambeson.victim import Victim, auto_batch_size
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

Work = dict[str, tuple[int, int]]
"""Images forward and image gradients, by what for: checks share what they look at."""


class Part(Config):
    """Upper bounds for one stage of an audit: images forward, and image gradients."""

    name: str
    forwards: int
    """In addition to those of gradients."""
    gradients: int
    surrogate: int = 0
    """Gradients of the surrogate, those of its training included."""


class Speed(Config):
    """Measured seconds per image."""

    forward: float
    gradient: float
    """A forward and a backward; 0 for a black box."""
    surrogate: float = 0.0
    """A gradient of the surrogate with respect to its weights."""
    random: bool = False
    """Whether the model is random, so that all is asked several times."""
    device: str = "cpu"

    def seconds(self, part: Part) -> float:
        """Return how long a part takes at the most."""
        return part.forwards * self.forward + part.gradients * self.gradient + part.surrogate * self.surrogate


class AuditPlan(Config):
    """The maximum cost of an audit. Adversarial images cost nothing more, so weak networks take less."""

    parts: tuple[Part, ...]
    speed: Speed
    surrogate: str
    """The net that is trained first; empty: none."""
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
    black_box, lent = isinstance(model, BlackBox), 0.0
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
    return Speed(forward=ahead, gradient=back, surrogate=lent, random=random, device=str(device))


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


def asked_parts(suite: Suite, data: Dataset, passes: int) -> tuple[Part, ...]:
    """Return upper bounds of the images queried by each stage of the audit of a black box.

    Args:
        suite: its settings.
        data: the data.
        passes: queries per scored image of a random black box.
    """
    test = min(suite.test_images or len(data.test), len(data.test))
    few, held = min(suite.pattern_images, len(data.train)), min(suite.pattern_images, len(data.validation))
    sample = min(suite.sample, test)
    controls, runs = suite.patterns_of_controls, RUNS if suite.eps_uni_runs is None else suite.eps_uni_runs
    craft = 2 * (suite.patterns * few + 3 * held) + 2 * held + test
    craft += (controls + 2) * held  # what stands for an eps is chosen on validation
    search = runs * (craft + held) + (runs * len(suite.eps) + runs * (runs - 1) // 2) * held
    search += 12 * test if runs else 0  # the error curve near eps_uni
    transferred = min(suite.transfer_images, test) if suite.surrogate != "none" else 0
    checked = 2 * test + 23 * sample
    checked += 0 if passes == 1 else 2 * sample  # of a random box: votes that choose the worst candidates
    asked = {
        "start": passes * test + 20,
        "universal curve": passes * len(suite.eps) * (craft + controls * test),
        "per image": sample * (suite.queries + 1),
        "eps_uni": passes * search,
        "transfer": passes * (test + 2 * transferred) if transferred else 0,
        "noise": passes * len(NOISES) * len(suite.noise_sizes) * test,
        "edits": passes * _edited(suite, test),
        "classes": passes * 2 * test * (len(data.classes) == 2),
        "diagnostics": passes * checked,
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


def images_asked(suite: Suite, data: Dataset, passes: int) -> int:
    """Return an upper bound of the images queried by the audit of a black box; see :func:`asked_parts`."""
    return sum(part.forwards for part in asked_parts(suite, data, passes))


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


def parts_of(suite: Suite, data: Dataset, *, random: bool = False, ran: Collection[str] = ()) -> tuple[Part, ...]:
    """Return upper bounds of what each stage of an audit costs, in the order of an audit that has a limit on its time.

    Args:
        suite: its settings, with its grid of eps.
        data: the data.
        random: whether the model is random.
        ran: checks that have run.
    """
    test = min(len(data.test), suite.test_images or len(data.test))
    held = min(len(data.validation), suite.validation_images or len(data.validation))
    sample, votes = min(suite.sample, test), suite.votes if random else 1
    eot_samples = suite.eot_samples if random else 1
    attack = suite.universal(suite.eps[0])
    run, screen = (
        attack.steps * attack.batch_size,
        attack.probe_starts * attack.probe_start_steps * attack.probe_start_batch,
    )
    probe_starts = attack.probe_starts * min(attack.probe_start_images, held)
    points, restarts = len(suite.eps), min(attack.restarts, attack.probe_starts or attack.restarts)
    runs = points * restarts + points - 1  # from the second eps on the eps before is one start more
    trials = TRIALS if suite.eps_uni_runs is None else suite.eps_uni_runs
    ranked = suite.patterns_of_controls * min(RANKED, held) + 2 * held  # what stands for an eps is chosen on validation
    scored = test * (1 + suite.patterns_of_controls) + ranked
    attacked = min(suite.suite_images, test) if suite.norm != "1" else 0
    of_maps = not data.test.task.per_image_label
    steps = suite.pgd_steps * suite.pgd_restarts * (3 if of_maps else 1)
    gradients, queries = (_MAP_SUITE, 1000) if of_maps else (SUITE_GRADIENTS, suite.suite_queries)
    jacobians = 0 if of_maps else suite.jacobian_backwards
    aims = 2 * suite.targeted * of_maps
    areas = 2 * test * (len(data.classes) == 2)
    aimed = aims * test * (3 + suite.patterns_of_controls)
    lent = _lent(suite, data)
    white = suite.auto_pgd and not (of_maps or random or suite.norm == "1")
    targeted = sum(_gradients_of(attack) for attack in suite.white_box(suite.eps[0]).values()) if white else 0
    again, batch = _asked_again(data, test, random=random), at_once(data.test)
    sizes = (7, 32, suite.universal_batch, 100, sample, batch)
    sets = (1 + bool(attacked) + 2 * of_maps + bool(white)) * suite.rescoring
    counts = _Counts(
        batches=sum(max(_PROBES, min(batch, size)) for size in sizes),
        again=again,
        sample=sample,
        test=test,
        held=held,
        pgd=suite.pgd_steps * suite.pgd_restarts,
        white=targeted or suite.pgd_steps * suite.pgd_restarts,
        short=min(20, suite.pgd_steps),
        steps=suite.pgd_steps,
        queries=min(300, suite.queries),
        random=random,
        draws=eot_samples,
    )
    asked, backward = work_of(tuple(CHECKS) if suite.checks == "all" else suite.checks, ran, counts)

    def part(name: str, forwards: int, gradients: int = 0) -> Part:
        return Part(name=name, forwards=forwards, gradients=gradients, surrogate=lent.get(name, 0))

    return (
        part("start", votes * test + min(CALIBRATED, held)),
        part("surrogate", 0),
        part("randomness", (votes + 1) * test if random else 0),
        part(
            "universal curve",
            votes * (points * (probe_starts + scored) + runs * held),
            points * screen + runs * run,
        ),
        part("re-scoring", votes * again * suite.rescoring),
        part("PGD, image by image", votes * (test + sets * again), eot_samples * test * steps),
        part("targeted Auto-PGD", votes * test, test * targeted) if white else part("targeted Auto-PGD", 0),
        part("attack suite", votes * attacked * queries, eot_samples * attacked * gradients),
        part("diagnostics", votes * asked, backward),
        part("transfer", votes * (2 * min(suite.transfer_images, test) + test) if lent else 0),
        part(
            "eps_uni",
            votes * (trials * (probe_starts + 3 * held + test + ranked + trials * min(RANKED, held)) + 12 * test)
            if trials
            else 0,
            trials * (screen + 2 * run),
        ),
        part(
            "eps_adv",
            votes * sample * 2 * TRIALS * suite.eps_adv,
            eot_samples * sample * suite.pgd_steps * TRIALS * suite.eps_adv,
        ),
        part("targets", votes * (aimed + aims * held), aims * (screen + run)),
        part("noise", votes * test * len(NOISES) * len(suite.noise_sizes)),
        part("edits", votes * _edited(suite, test)),
        part("classes", votes * (areas + (test + 2 * held) * suite.class_wise), _class_wise(suite)),
        part("Jacobian analysis", 4 * jacobians, 3 * jacobians),
    )


@dataclass(frozen=True)
class _Counts:
    """What the cost of a check depends on."""

    sample: int
    test: int
    held: int
    pgd: int
    """Gradients per image of the suite's PGD."""
    white: int
    """Those of the strongest attack with gradients that every image gets."""
    short: int
    """Those of the short one that checks compare with."""
    steps: int
    queries: int
    batches: int
    """Images in batches of several sizes together."""
    again: int
    """Images forward where perturbed ones are asked for again in every way."""
    random: bool
    draws: int
    """Draws of a random model per gradient."""

    def work(
        self, name: str, forwards: int = 0, gradients: int = 0, beside: int = 0, apart: int = 0, shares: str = ""
    ) -> Work:
        """Cost of a check.

        Args:
            name: of the check.
            forwards: per image of the sample.
            gradients: likewise.
            beside: images forward whatever the sample.
            apart: image gradients whatever the sample.
            shares: the attack on the sample that other checks look at too.
        """
        attacks = {"PGD": self.pgd, "white box": self.white, "short PGD": self.short}
        shared = {shares: (self.sample, self.draws * self.sample * attacks[shares])} if shares else {}
        return shared | {name: (forwards * self.sample + beside, self.draws * (gradients * self.sample + apart))}


def _gradients_of(attack: PGD | TargetedAutoPGD) -> int:
    """Gradients per image that is never broken."""
    if isinstance(attack, TargetedAutoPGD):
        return (attack.targets or 1) * (attack.probe_steps or 0) + (
            attack.targets_kept or attack.targets or 1
        ) * attack.steps
    return attack.steps * attack.restarts


def _asked_again(data: Dataset, test: int, *, random: bool) -> int:
    """Images forward where as many are asked for again in every way, see :func:`gambeson.auditing.rescoring.ways`."""
    if random:
        return 2 * test
    few = min(MOST, test)
    return 6 * few + max(few, auto_batch_size(data.test.shape, 1024, 2**23))


_PROBES, _BATCHES = 16, 13
"""Images whose gradients are compared, and how often beside batches of other sizes."""
CHECKS: dict[str, Callable[[_Counts], dict[str, Any]]] = {
    "better than majority class": lambda n: {},
    "perturbation budget used": lambda n: {},
    "crafted beats controls": lambda n: {},  # unless a control has won, whose images are then compared
    "deterministic or majority vote": lambda n: {},
    "input unchanged": lambda n: {},
    "UER monotone in eps": lambda n: {},
    "no noise-off gap": lambda n: {"gradients": 20 * n.random, "forwards": 5 * n.random},
    "no EOT gap": lambda n: {"gradients": 32 * n.random},
    "no vanishing gradients": lambda n: {"gradients": 2},
    "gradient matches finite differences": lambda n: {"forwards": 1, "gradients": 1},
    "gradient complete": lambda n: {"forwards": 75, "gradients": 6},
    "no optimisation at test time": lambda n: {},  # after the one before
    "independent of the batch": lambda n: {"beside": 100},
    "stateless": lambda n: {"beside": min(n.sample, n.test) + 160},
    "re-scoring reproducible": lambda n: {"beside": n.test},
    "monotone in step size": lambda n: {"gradients": 2},
    "gradient independent of the batch": lambda n: {"apart": _BATCHES * _PROBES + n.batches},
    "unbounded attack succeeds": lambda n: {"gradients": 40},
    "white box beats queries": lambda n: {"forwards": n.queries + 40 if n.queries else 0, "shares": "white box"},
    "white box beats transfer": lambda n: {"forwards": 2, "shares": "white box"},
    "no weaker inside the ball": lambda n: {"gradients": n.short, "shares": "short PGD"},
    "alike in every batch": lambda n: {"beside": n.again // 2},
    "gradient beats random search": lambda n: {"forwards": 2 * n.pgd, "shares": "PGD"},
    "multi-step beats single-step": lambda n: {"gradients": 1, "shares": "PGD"},
    "attack beats noise": lambda n: {"forwards": 1, "shares": "PGD"},
    "universal white box beats transfer": lambda n: {"beside": 2 * n.test},
    "attacks find what is there": lambda n: {"beside": 24 * (300 + 2 * n.queries), "apart": 48 * (n.pgd + n.white)},
    "margin loss no stronger": lambda n: {"gradients": n.short + 3, "shares": "short PGD"},
    "attack has converged": lambda n: {"gradients": n.pgd + 3 * n.white, "shares": "white box"},
    "single step approximates multi-step": lambda n: {"forwards": 4, "gradients": 12},
    "no test-set leakage": lambda n: {"gradients": n.pgd, "beside": n.test + n.held, "shares": "PGD"},
    "random start no stronger": lambda n: {"gradients": 2},
    "monotone in eps": lambda n: {"gradients": 2 * n.short, "shares": "short PGD"},
    "attack repeats its outcome": lambda n: {"apart": min(64, n.sample) * n.steps},
}
"""The built-in checks with their costs, see :meth:`_Counts.work`, in the order in which an audit with a limit on its
time runs them: what costs nothing first, then by what they found on the testbed for their price. One that is not
listed comes last and is taken for two attacks (ours)."""
_UNLISTED = {"forwards": 50, "gradients": 40}


def work_of(names: Collection[str], ran: Collection[str], counts: _Counts) -> tuple[int, int]:
    """Return the images forward and the image gradients of checks, beside those that have run."""

    def needed(name: str) -> Work:
        return counts.work(name, **(CHECKS[name](counts) if name in CHECKS else _UNLISTED))

    left: Work = {}
    for name in names:
        left |= needed(name) if name not in ran else {}
    for name in ran:
        left = {work: cost for work, cost in left.items() if work not in needed(name)}
    return sum(ahead for ahead, _ in left.values()), sum(back for _, back in left.values())


def plan(model: nn.Module, data: Dataset, suite: Suite, seed: int = 0, speed: Speed | None = None) -> AuditPlan:
    """Count what an audit asks of a model and measure a few batches; the model comes back as it was.

    Args:
        model: from pixels to logits, on the device of the audit.
        data: with the splits of the audit.
        suite: how thorough.
        seed: of a random model's draws.
        speed: of the model, if measured.

    Raises:
        UserError: a black box, whose cost is what it is asked: that is bounded by a budget.
    """
    if isinstance(model, BlackBox):
        raise UserError("the model is a black box, whose cost is what it is asked: bound that by --budget instead")
    suite = suite.on(data)
    surrogate.check(suite, data, model)
    return AuditPlan(
        parts=parts_of(suite, data, random=(speed := speed or measured(model, data, suite, seed)).random),
        speed=speed,
        surrogate=surrogate.choose(suite, data)[0] or ("" if suite.surrogate in ("auto", "none") else suite.surrogate),
    )
