"""What an audit asks a black box, in images, and how it is made smaller until a budget has room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gambeson.auditing.corruption import NOISES
from gambeson.auditing.suite import Suite
from gambeson.base import Config, UserError
from gambeson.data import Dataset

TEST_IMAGES = 2000
"""Test images that a black box is asked about where the suite leaves the number open."""
_RESERVE = 0.1
"""Share of a budget that is kept for requests that are lost and sent again."""
_RUNS = 6
"""Perturbations that the search of eps_uni crafts at most, where the suite leaves the number open."""


class Plan(Config):
    """The suite as a budget has room for it."""

    suite: Suite
    notes: list[str]
    """What was made smaller, in sentences."""
    images: int
    """The most images that will be asked about, lost requests aside."""


def images_asked(suite: Suite, data: Dataset, passes: int) -> int:
    """Return an upper bound of the images that the audit of a black box asks about, from the first stage on.

    Args:
        suite: its settings.
        data: the data.
        passes: how often a random box is asked about an image that is scored.
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


def fit(suite: Suite, data: Dataset, room: int | None, passes: int) -> Plan:
    """Make an audit as small as it has to be.

    Args:
        suite: what was asked for, with its grid of eps.
        data: the data.
        room: images that may still be asked about; None: no limit.
        passes: see :func:`images_asked`.

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
    for suite in _smaller(asked, min(asked.test_images or len(data.test), len(data.test))):
        images = images_asked(suite, data, passes)
        if room is None or images <= (1 - _RESERVE) * room:
            break
    else:
        least = int(images / (1 - _RESERVE)) + 1
        raise UserError(
            f"a budget with room for {room} images is too small: the smallest audit asks about {least}; give a larger "
            "--budget"
        )
    if suite != asked:
        notes.append(
            f"The budget of {asked.budget} images made the audit smaller: {'; '.join(_changes(asked, suite))}."
        )
    return Plan(suite=suite, notes=notes, images=images)


def _smaller(suite: Suite, test: int) -> Iterator[Suite]:
    """Yield ever smaller suites: first what only costs precision, then what can be left out."""
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
        lambda: suite.model_copy(update={"eps": suite.eps[len(suite.eps) // 2 :][:1]}),
        at_most(patterns=10, pattern_images=30, test_images=50, sample=20),
        lambda: suite.model_copy(update={"noise_sizes": ()}),
    ]
    for step in steps:
        suite = step()
        yield suite


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
        yield f"{len(suite.noise_sizes)} sizes of plain noise in place of {len(asked.noise_sizes)}"
    if suite.eps != asked.eps:
        yield f"the curve has {len(suite.eps)} eps in place of {len(asked.eps)}"
