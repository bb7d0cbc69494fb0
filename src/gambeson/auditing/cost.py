"""Costs of an audit: estimates, and fitting the audit of a black box to a query budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.corruption import NOISES
from gambeson.auditing.suite import Suite
from gambeson.base import Config, UserError, seeded
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.universal import RANKED
from gambeson.victim import Victim

TEST_IMAGES = 2000
"""Default number of test images for a black box."""
_RESERVE = 0.1
"""Share of a budget reserved for retries."""
_RUNS = 6
"""Default maximum of perturbations crafted in the search of eps_uni."""


class BudgetPlan(Config):
    """A suite that fits a budget."""

    suite: Suite
    notes: list[str]
    """What was reduced, as sentences."""
    images: int
    """Upper bound of the images queried, without retries."""


def images_asked(suite: Suite, data: Dataset, passes: int) -> int:
    """Return an upper bound of the images queried by the audit of a black box.

    Args:
        suite: its settings.
        data: the data.
        passes: queries per scored image of a random black box.
    """
    test = min(suite.test_images or len(data.test), len(data.test))
    few, held = min(suite.pattern_images, len(data.train)), min(suite.pattern_images, len(data.validation))
    sample = min(suite.sample, test)
    controls, runs = suite.patterns_of_controls, _RUNS if suite.eps_uni_runs is None else suite.eps_uni_runs
    craft = 2 * (suite.patterns * few + 3 * held) + 2 * held + test
    craft += (controls + 2) * held  # what stands for an eps is chosen on validation
    scored = test + len(suite.eps) * (craft + controls * test)
    scored += runs * (craft + held) + (runs * len(suite.eps) + runs * (runs - 1) // 2) * held
    scored += 12 * test if runs else 0  # the error curve near eps_uni
    if suite.surrogate != "none":
        scored += test + 2 * min(suite.transfer_images, test)
    scored += len(NOISES) * len(suite.noise_sizes) * test
    scored += 2 * test + 14 * sample  # diagnostics
    scored += 0 if passes == 1 else 2 * sample  # of a random box: votes that choose the worst candidates
    return passes * scored + sample * (suite.queries + 1) + 20


def fit(suite: Suite, data: Dataset, room: int | None, passes: int, *, keep_eps: bool = False) -> BudgetPlan:
    """Reduce an audit until it fits a budget, and give what is left of it to the search of universal perturbations.

    Args:
        suite: the requested suite, with its grid of eps.
        data: the data.
        room: remaining budget in images; None: unlimited.
        passes: see :func:`images_asked`.
        keep_eps: whether every eps stays, because the user named them.

    Raises:
        UserError: even the smallest audit does not fit.
    """
    notes = []
    if suite.test_images is None and len(data.test) > TEST_IMAGES:
        suite = suite.model_copy(update={"test_images": TEST_IMAGES})
        notes.append(
            f"Of {len(data.test)} test images {TEST_IMAGES} were asked about, as suits a black box; "
            "suite.test_images sets another number."
        )
    if suite.eps_uni_runs is None:
        suite = suite.model_copy(update={"eps_uni_runs": _RUNS})
    asked = suite
    for suite in _smaller(asked, min(asked.test_images or len(data.test), len(data.test)), keep_eps):
        images = images_asked(suite, data, passes)
        if room is None or images <= (1 - _RESERVE) * room:
            break
    else:
        least = int(images / (1 - _RESERVE)) + 1
        raise UserError(
            f"a budget with room for {room} images is too small: the smallest audit of {len(suite.eps)} eps asks about "
            f"{least}; give a larger --budget{' or fewer --eps' if keep_eps and len(suite.eps) > 1 else ''}"
        )
    if suite != asked and room is not None:
        suite = _larger(suite, asked, data, passes, (1 - _RESERVE) * room)
        images = images_asked(suite, data, passes)
    if suite != asked:
        notes.append(
            f"The budget of {asked.budget} images made the audit smaller: {'; '.join(_changes(asked, suite))}."
        )
    return BudgetPlan(suite=suite, notes=notes, images=images)


def _smaller(suite: Suite, test: int, keep_eps: bool) -> Iterator[Suite]:
    """Yield decreasing suites: first reductions of precision, then omissions of stages."""
    yield suite

    def at_most(**limits: int) -> Callable[[], Suite]:
        def limited() -> Suite:
            now = {name: getattr(suite, name) for name in limits}
            now["test_images"] = now.get("test_images") or test
            return suite.model_copy(
                update={name: min(now[name], limit) for name, limit in limits.items() if now[name] > limit}
            )

        return limited

    steps: list[Callable[[], Suite]] = [
        at_most(test_images=1000),
        at_most(patterns=50, pattern_images=100, queries=200),
        at_most(test_images=500, transfer_images=500),
        at_most(patterns=30, pattern_images=60, sample=100),
        lambda: suite.model_copy(update={"noise_sizes": suite.noise_sizes[:2]}),
        at_most(eps_uni_runs=3),
        at_most(test_images=250, queries=100),
        at_most(eps_uni_runs=0),
        at_most(queries=0),
        at_most(test_images=100, sample=50, transfer_images=100),
        lambda: suite.model_copy(update={"noise_sizes": suite.noise_sizes[:1]}),
        lambda: suite if keep_eps else suite.model_copy(update={"eps": suite.eps[len(suite.eps) // 2 :][:1]}),
        at_most(patterns=10, pattern_images=30, test_images=50, sample=20),
        lambda: suite.model_copy(update={"noise_sizes": ()}),
    ]
    for step in steps:
        suite = step()
        yield suite


def _larger(suite: Suite, asked: Suite, data: Dataset, passes: int, room: float) -> Suite:
    """Raise the numbers of a suite that fits towards those asked for, one after the other, as far as there is room."""
    for name in ("patterns", "pattern_images", "test_images", "sample", "queries", "transfer_images"):
        numbers = [getattr(one, name) for one in (suite, asked)]
        low, most = (len(data.test) if number is None else number for number in numbers)
        high = most
        while low < high:
            middle = (low + high + 1) // 2
            if images_asked(suite.model_copy(update={name: middle}), data, passes) <= room:
                low = middle
            else:
                high = middle - 1
        suite = suite.model_copy(update={name: numbers[1] if low == most else low})
    return suite


def omitted(asked: Suite, suite: Suite) -> list[str]:
    """Return what a smaller suite leaves out as a whole, as parts of a sentence."""
    runs = asked.eps_uni_runs is None or asked.eps_uni_runs > 0
    eps = len(asked.eps) - len(suite.eps)
    return [
        *([f"{eps} of the {len(asked.eps)} eps"] if eps else []),
        *(["the search of eps_uni"] if runs and suite.eps_uni_runs == 0 else []),
        *(["Square"] if asked.queries and not suite.queries else []),
        *(["plain noise"] if asked.noise_sizes and not suite.noise_sizes else []),
    ]


_WORDS = {
    "test_images": "test images",
    "patterns": "noise patterns of each kind",
    "pattern_images": "images that each pattern is tried on",
    "sample": "images that diagnostics look at",
    "queries": "queries an image of Square",
    "transfer_images": "images perturbed on the surrogate",
    "eps_uni_runs": "perturbations crafted in the search of eps_uni",
}


def _changes(asked: Suite, suite: Suite) -> Iterator[str]:
    for name, words in _WORDS.items():
        before, now = getattr(asked, name), getattr(suite, name)
        if before == now:
            continue
        if name == "eps_uni_runs" and not now:
            yield "eps_uni was read off the curve"
        elif name == "queries" and not now:
            yield "Square was left out"
        else:
            yield f"{now} {words}" + ("" if before is None else f" in place of {before}")
    if suite.noise_sizes != asked.noise_sizes:
        one = len(suite.noise_sizes) == 1
        yield f"{len(suite.noise_sizes)} size{'' if one else 's'} of plain noise in place of {len(asked.noise_sizes)}"
    if suite.eps != asked.eps:
        yield f"the curve has {len(suite.eps)} eps in place of {len(asked.eps)}"


SUITE_GRADIENTS = 10 + 100 + 9 * 20 + 3 * 100
"""Gradients of the standard suite per image that is never broken."""
_MAP_SUITE = 3 * 300
"""The same of label maps."""
_TRIALS = 8
"""Default maximum of perturbations crafted in the search of eps_uni."""
_ATTACKS = 20
"""Short attacks of the diagnostics on their sample, with at most the steps of PGD."""
_BATCH, _TIMED = 32, 3


class Part(Config):
    """Upper bounds for one stage of an audit: images forward, and image gradients."""

    name: str
    forwards: int
    """In addition to those of gradients."""
    gradients: int


class AuditPlan(Config):
    """The maximum cost of an audit. Adversarial images cost nothing more, so weak networks take less."""

    parts: tuple[Part, ...]
    seconds_a_forward: float
    """Seconds per image in a batch of 32, the median of three batches."""
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
    surrogate.check(suite, data, model)
    few = data.train.sample(_BATCH, seed=seed)
    with Victim(model, fast=True) as victim, seeded(seed, "plan"):
        images, _ = few.take(slice(None), victim.device)
        random = victim.inspect(images[:8]).stochastic

        def forward() -> None:
            with torch.no_grad():
                victim.forward_original(images)

        def gradient() -> None:
            point = images.clone().requires_grad_()
            victim.gradient(victim(point).logsumexp(1).sum(), point, len(images))

        times = [_median(work, victim.device) / len(images) for work in (forward, gradient)]
        device = str(victim.device)
    return AuditPlan(
        parts=_parts(suite, data, random),
        seconds_a_forward=times[0],
        seconds_a_gradient=times[1],
        surrogate=surrogate.choose(suite, data)[0] or ("" if suite.surrogate in ("auto", "none") else suite.surrogate),
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
    sample, votes = min(suite.sample, len(data.test)), suite.votes if random else 1
    eot_samples = suite.eot_samples if random else 1
    attack = suite.universal(suite.eps[0])
    run, screen = (
        attack.steps * attack.batch_size,
        attack.probe_starts * attack.probe_start_steps * attack.probe_start_batch,
    )
    probe_starts = attack.probe_starts * min(attack.probe_start_images, held)
    points, restarts = len(suite.eps), min(attack.restarts, attack.probe_starts or attack.restarts)
    runs = points * restarts + points - 1  # from the second eps on the eps before is one start more
    trials = _TRIALS if suite.eps_uni_runs is None else suite.eps_uni_runs
    ranked = suite.patterns_of_controls * min(RANKED, held) + 2 * held  # what stands for an eps is chosen on validation
    scored = test * (1 + suite.patterns_of_controls) + ranked
    attacked = min(suite.suite_images, test) if suite.norm != "1" else 0
    of_maps = not data.test.task.per_image_label
    steps = suite.pgd_steps * suite.pgd_restarts * (3 if of_maps else 1)
    gradients, queries = (_MAP_SUITE, 1000) if of_maps else (SUITE_GRADIENTS, suite.suite_queries)
    jacobians = 0 if of_maps else suite.jacobian_backwards
    aims = 2 * suite.targeted * of_maps
    aimed = aims * test * (3 + suite.patterns_of_controls)
    return (
        Part(
            name="universal curve",
            forwards=votes * (points * (probe_starts + scored) + runs * held),
            gradients=points * screen + runs * run,
        ),
        Part(
            name="eps_uni",
            forwards=votes
            * (trials * (probe_starts + 3 * held + test + ranked + trials * min(RANKED, held)) + 12 * test),
            gradients=trials * (screen + 2 * run),
        ),
        Part(
            name="eps_adv",
            forwards=votes * sample * 2 * _TRIALS * suite.eps_adv,
            gradients=eot_samples * sample * suite.pgd_steps * _TRIALS * suite.eps_adv,
        ),
        Part(name="PGD, image by image", forwards=votes * test, gradients=eot_samples * test * steps),
        Part(
            name="attack suite",
            forwards=votes * attacked * queries,
            gradients=eot_samples * attacked * gradients,
        ),
        Part(name="targets", forwards=votes * (aimed + aims * held), gradients=aims * (screen + run)),
        Part(
            name="transfer and noise",
            forwards=votes * (2 * suite.transfer_images + test * (1 + 3 * len(suite.noise_sizes))),
            gradients=0,
        ),
        Part(name="Jacobian analysis", forwards=4 * jacobians, gradients=3 * jacobians),
        Part(
            name="diagnostics",
            forwards=votes * sample * (suite.queries + 100) + 75 * sample,
            gradients=eot_samples * sample * _ATTACKS * min(20, suite.pgd_steps),
        ),
    )
