"""Budgets of an audit, of queries to a black box and of time: what a suite that fits them gives up, and in which order.

A suite has settings that cost: numbers of images, steps and runs, and what may be left out as a whole. A ladder lists
limits on them, rung after rung, from what tells least for its price to what tells most. An audit that is too dear goes
down the ladder until it fits, and what is then left of the budget raises the settings again, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gambeson.auditing.amounts import CHECKS
from gambeson.auditing.cost import RUNS, TRIALS, most_images
from gambeson.auditing.suite import Suite, middle_of
from gambeson.base import Config, UserError
from gambeson.data import Dataset

TEST_IMAGES = 2000
"""Default number of test images for a black box."""
RESERVE = 0.1
"""Share of a budget that is kept back, for retries and for what takes longer than estimated."""

Rung = Mapping[str, int]
"""Upper limits of settings, by name."""

QUERY_LADDER: tuple[Rung, ...] = (
    {"test_images": 1000},
    {"patterns": 50, "pattern_images": 100, "queries": 200, "edit_images": 300},
    {"test_images": 500, "transfer_images": 500},
    {"patterns": 30, "pattern_images": 60, "sample": 100, "edit_images": 100},
    {"noise_sizes": 2},
    {"eps_uni_runs": 3},
    {"test_images": 250, "queries": 100},
    {"edits": 0},
    {"eps_uni_runs": 0},
    {"queries": 0},
    {"test_images": 100, "sample": 50, "transfer_images": 100},
    {"noise_sizes": 1},
    {"eps": 1},
    {"patterns": 10, "pattern_images": 30, "test_images": 50, "sample": 20},
    {"noise_sizes": 0},
)
"""Of a black box, whose price are queries: first reductions of precision, then omissions."""
_QUERIES_BACK = ("patterns", "pattern_images", "test_images", "sample", "queries", "transfer_images")
"""What is raised again: most goes to the search of universal perturbations."""

TIME_LADDER: tuple[Rung, ...] = (
    {
        **{"universal_steps": 400, "universal_restarts": 4, "universal_probe_starts": 8, "universal_batch": 64},
        **{"pgd_steps": 40, "pgd_restarts": 2, "suite_images": 500, "jacobian_backwards": 4000, "queries": 500},
        **{"transfer_images": 1000, "surrogate_images": 20_000, "surrogate_epochs": 10},
    },
    {
        "eps_uni_runs": 3,
        "jacobian_backwards": 1500,
        "suite_images": 200,
        "test_images": 2000,
        "validation_images": 2000,
        "edit_images": 300,
    },
    {
        **{"universal_steps": 100, "universal_restarts": 1, "universal_probe_starts": 3, "universal_batch": 32},
        **{"pgd_steps": 20, "pgd_restarts": 1, "test_images": 1000, "validation_images": 500, "sample": 100},
        **{"transfer_images": 500, "surrogate_images": 8000, "surrogate_epochs": 6, "queries": 200, "noise_sizes": 2},
        **{"patterns": 40, "pattern_images": 100},
    },
    {
        "universal_queries": 30_000,
        "eps_uni_runs": 1,
        "suite_images": 100,
        "jacobian_backwards": 0,
        "edit_images": 100,
        "class_wise": 0,
        "certified": 0,
    },
    {"eps_uni_runs": 0, "suite_images": 0, "eps": 3, "test_images": 500, "noise_sizes": 1},
    {"eps_adv": 0, "targeted": 0, "auto_pgd": 0, "noise_sizes": 0, "edits": 0, "universal_probe_starts": 0},
    {"patterns": 20, "pattern_images": 60},
    {"surrogate": 0, "universal_queries": 0, "transfer_images": 100, "sample": 50},
    {"eps": 1, "test_images": 300, "validation_images": 200, "queries": 100},
    {"universal_steps": 50, "checks": 22, "pgd_steps": 10, "rescoring": 0},
    {"test_images": 100, "validation_images": 60, "sample": 32, "checks": 13, "queries": 0},
    {"universal_steps": 30, "universal_batch": 16, "test_images": 50, "validation_images": 32, "sample": 20},
    {"universal_steps": 15, "test_images": 32, "validation_images": 24, "sample": 16, "checks": 6, "pgd_steps": 5},
    {"patterns": 10, "pattern_images": 30},
)
"""Of time. What is given back first is what was taken last."""

_WORDS = {
    "test_images": "test images",
    "validation_images": "validation images",
    "universal_steps": "step{s} of the universal attack",
    "universal_restarts": "restart{s} of the universal attack",
    "universal_batch": "images per step of the universal attack",
    "pgd_steps": "step{s} of PGD",
    "pgd_restarts": "restart{s} of PGD",
    "patterns": "noise patterns of each kind",
    "pattern_images": "images that each pattern is tried on",
    "sample": "images that diagnostics look at",
    "suite_images": "images for the attack suite",
    "queries": "queries an image of Square",
    "universal_queries": "queries of universal NES",
    "transfer_images": "images perturbed on the surrogate",
    "edit_images": "images that edits are tried on",
    "jacobian_backwards": "backward passes of each part of the Jacobian analysis",
    "eps_uni_runs": "perturbation{s} crafted in the search of eps_uni",
}
_GONE = {
    "eps_uni_runs": ("eps_uni was read off the curve", "the search of eps_uni"),
    "queries": ("Square was left out", "Square"),
    "universal_queries": ("universal NES was left out", "universal NES"),
    "noise_sizes": ("plain noise was left out", "plain noise"),
    "suite_images": ("the attack suite was left out", "the attack suite"),
    "edits": ("edits of images were left out", "edits"),
    "class_wise": ("class-wise perturbations were left out", "class-wise perturbations"),
    "certified": ("no accuracy was certified", "certified bounds"),
    "jacobian_backwards": ("the Jacobian analysis was left out", "the Jacobian analysis"),
    "eps_adv": ("eps_adv was not searched", "eps_adv"),
    "targeted": ("perturbations with a target were left out", "targets"),
    "surrogate": ("transfer was left out", "transfer"),
    "auto_pgd": ("targeted Auto-PGD on every image was left out", "targeted Auto-PGD"),
    "rescoring": ("perturbed images were not asked for again in other ways", "re-scoring"),
}
"""What is said where nothing is left of a setting: as a sentence, and as a part of one."""


_USEFUL = {"jacobian_backwards": 500, "suite_images": 50}
"""With less of a setting than this nothing is worth saying (ours)."""


@dataclass(frozen=True)
class Budget:
    """What an audit may cost."""

    cost: Callable[[Suite], float]
    """Upper bound of what a suite costs."""
    room: float
    """What there is of it."""

    def holds(self, suite: Suite) -> bool:
        """Whether the suite fits, with :data:`RESERVE` left."""
        return self.cost(suite) <= (1 - RESERVE) * self.room


def amount(suite: Suite, name: str, data: Dataset) -> int:
    """How much of a setting there is: a number, the length of a list, or 1 for what is there as a whole."""
    value = getattr(suite, name)
    if value is None:
        return {"test_images": len(data.test), "validation_images": len(data.validation)}.get(name, TRIALS)
    if name == "surrogate":
        return int(value != "none")
    if name == "checks":
        return len(CHECKS) if value == "all" else len(value)
    return len(value) if isinstance(value, tuple) else int(value)


def with_amount(suite: Suite, asked: Suite, name: str, number: int, data: Dataset) -> Suite:
    """Return a suite with so much of a setting of the one that was asked for.

    Of eps the middle ones stay, of checks those that come first in :data:`gambeson.auditing.amounts.CHECKS`.
    """
    value: Any = getattr(asked, name)
    if number < amount(asked, name, data):
        if name == "surrogate":
            value = "none"
        elif name == "eps":
            value = middle_of(value, number)
        elif name == "checks":
            value = tuple([check for check in CHECKS if value == "all" or check in value][:number])
        else:
            value = value[:number] if isinstance(value, tuple) else type(value)(number) if value is not None else number
    return suite.model_copy(update={name: value})


def fit(
    asked: Suite,
    data: Dataset,
    budgets: Sequence[Budget],
    ladder: Sequence[Rung],
    *,
    fixed: Iterable[str] = (),
    least: Mapping[str, int] | None = None,
) -> tuple[Suite, bool]:
    """Reduce a suite until it fits every budget, and give what is left back.

    Args:
        asked: the suite.
        data: the data.
        budgets: all of which it has to fit.
        ladder: limits, from what is given up first to what is given up last.
        fixed: settings that stay.
        least: lower limits of settings, such as what has been spent already.

    Returns:
        The suite, and whether it fits; else it is the smallest of the ladder.
    """
    fixed, least = set(fixed), least or {}
    steps: list[tuple[Suite, list[str]]] = [(asked, [])]
    for rung in ladder:
        suite, lowered = steps[-1][0], []
        if all(budget.holds(suite) for budget in budgets):
            break
        for name, limit in rung.items():
            limit = max(limit, least.get(name, 0))
            if name not in fixed and amount(suite, name, data) > limit:
                suite = with_amount(suite, asked, name, limit, data)
                lowered.append(name)
        steps.append((suite, lowered))
    suite = steps[-1][0]
    if not all(budget.holds(suite) for budget in budgets):
        return suite, False
    if ladder is QUERY_LADDER:
        back: list[tuple[str, Suite]] = [] if suite == asked else [(name, asked) for name in _QUERIES_BACK]
    else:
        pairs = reversed(list(pairwise(steps)))
        back = [(name, before) for (before, _), (_, lowered) in pairs for name in lowered]
    for name, before in back:
        suite = _raised(suite, asked, name, amount(before, name, data), data, budgets)
    return suite, True


def _raised(suite: Suite, asked: Suite, name: str, most: int, data: Dataset, budgets: Sequence[Budget]) -> Suite:
    """Raise one setting as far as there is room, within a fiftieth."""
    low, high = amount(suite, name, data), most
    trial = high  # often there is room for all of it
    while low < high:
        if all(budget.holds(with_amount(suite, asked, name, trial, data)) for budget in budgets):
            low = trial
        else:
            high = trial - 1
        if high - low <= low // 50:
            break
        trial = (low + high + 1) // 2
    return with_amount(suite, asked, name, low, data) if low >= _USEFUL.get(name, 0) else suite


class BudgetPlan(Config):
    """A suite that fits the budget of a black box."""

    suite: Suite
    notes: list[str]
    """What was reduced, as sentences."""
    images: int
    """Upper bound of the images queried, without retries."""


def fit_queries(
    suite: Suite,
    data: Dataset,
    room: int | None,
    votes: int,
    *,
    keep_eps: bool = False,
) -> BudgetPlan:
    """Reduce an audit until it fits a budget of queries; what is left goes to the search of universal perturbations.

    Args:
        suite: the requested suite, with its grid of eps.
        data: the data.
        room: remaining budget in images; None: unlimited.
        votes: see :func:`gambeson.auditing.cost.asked_parts`.
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
        suite = suite.model_copy(update={"eps_uni_runs": RUNS})
    asked = suite
    if room is not None:
        queries = Budget(lambda one: most_images(one, data, votes), room)
        suite, fits = fit(asked, data, [queries], QUERY_LADDER, fixed=["eps"] if keep_eps else [])
        if not fits:
            least = int(most_images(suite, data, votes) / (1 - RESERVE)) + 1
            raise UserError(
                f"a budget with room for {room} images is too small: the smallest audit of {len(suite.eps)} eps asks "
                f"about {least}; give a larger --budget{' or fewer --eps' if keep_eps and len(suite.eps) > 1 else ''}"
            )
    if suite != asked:
        notes.append(f"The budget of {asked.budget} images made the audit smaller: {changes(asked, suite)}.")
    return BudgetPlan(suite=suite, notes=notes, images=most_images(suite, data, votes))


def omitted(asked: Suite, suite: Suite) -> list[str]:
    """Return what a smaller suite leaves out as a whole, as parts of a sentence."""
    eps = len(asked.eps) - len(suite.eps)
    return [*([f"{eps} of the {len(asked.eps)} eps"] if eps else []), *lost(asked, suite).values()]


def lost(asked: Suite, suite: Suite) -> dict[str, str]:
    """Return the settings of which a smaller suite leaves nothing, each as a part of a sentence."""
    return {name: part for name, (_, part) in _GONE.items() if _there(asked, name) and not _there(suite, name)}


def _there(suite: Suite, name: str) -> bool:
    value = getattr(suite, name)
    return value is None or (value != "none" if name == "surrogate" else bool(value))


def changes(asked: Suite, suite: Suite) -> str:
    """Return what a smaller suite reduces and leaves out, as a sentence's list."""
    return "; ".join(_changes(asked, suite))


def _changes(asked: Suite, suite: Suite) -> Iterator[str]:
    for name, words in _WORDS.items():
        before, now = getattr(asked, name), getattr(suite, name)
        if before != now and not (name in _GONE and not now):
            yield f"{now} {words.format(s='' if now == 1 else 's')}" + (
                "" if before is None else f" in place of {before}"
            )
    for name, (sentence, _) in _GONE.items():
        if name != "noise_sizes" and _there(asked, name) and not _there(suite, name):
            yield sentence
    if suite.noise_sizes != asked.noise_sizes:
        one = len(suite.noise_sizes) == 1
        yield f"{len(suite.noise_sizes)} size{'' if one else 's'} of plain noise in place of {len(asked.noise_sizes)}"
    if suite.eps != asked.eps:
        yield f"the curve has {len(suite.eps)} eps in place of {len(asked.eps)}"
    total = len(CHECKS) if asked.checks == "all" else len(asked.checks)
    if suite.checks != "all" and len(suite.checks) < total:
        yield f"{len(suite.checks)} checks in place of {total}"


def listed(parts: Sequence[str]) -> str:
    """Join parts of a sentence."""
    return ", ".join([*parts[:-2], " and ".join(parts[-2:])])
