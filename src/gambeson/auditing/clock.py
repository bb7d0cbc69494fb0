"""An audit against the clock: settings that fit a time, chosen again between stages from the times that those took."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from torch import nn

from gambeson.auditing.amounts import CHECKS
from gambeson.auditing.budget import RESERVE, TIME_LADDER, Budget, changes, fit, listed, omitted
from gambeson.auditing.context import untouched_copy
from gambeson.auditing.cost import Part, Speed, asked_parts, measured, parts_of
from gambeson.auditing.stages import own
from gambeson.auditing.suite import Suite
from gambeson.base import UserError
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox, BudgetSpent, Rate

if TYPE_CHECKING:
    from gambeson.auditing.results import UniversalResult

_MARGIN = 0.02
"""Share of the time that is kept for writing the result: no stage goes on into it."""
_PRIOR = 0.02
"""Share of the time whose stages have to be seen before their pace counts as much as the first batches do."""

CURVE, CHECKED, OWN = "universal curve", "diagnostics", "own attacks"
"""Parts of the costs that several stages share."""
BY_WORTH = (
    *(
        "surrogate",
        "randomness",
        "universal NES",
        CURVE,
        "re-scoring",
        "per image",
        CHECKED,
        "transfer",
        "eps_uni",
        "eps_adv",
        "targets",
        OWN,
    ),
    *("noise", "edits", "classes", "certified", "Jacobian analysis"),
)
"""Stages in the order of an audit against the clock."""
_STAGE_OF = {"PGD, image by image": "per image", "attack suite": "per image", "targeted Auto-PGD": "per image"}
_SETTINGS_OF = {
    "start": ("test_images", "validation_images", "pattern_images"),
    "surrogate": ("surrogate", "surrogate_images", "surrogate_epochs"),
    "universal NES": ("universal_queries",),
    CURVE: ("universal_steps", "universal_restarts", "universal_batch", "universal_probe_starts", "patterns"),
    "re-scoring": ("rescoring",),
    "per image": ("pgd_steps", "pgd_restarts", "suite_images", "auto_pgd"),
    CHECKED: ("sample", "queries"),
    "transfer": ("transfer_images",),
    "eps_uni": ("eps_uni_runs",),
    "eps_adv": ("eps_adv", "sample"),
    "targets": ("targeted",),
    "noise": ("noise_sizes",),
    "edits": ("edits", "edit_images"),
    "classes": ("class_wise",),
    "certified": ("certified",),
    "Jacobian analysis": ("jacobian_backwards", "sample"),
}
"""Settings that stay once a stage has begun with them."""


STOPPED: dict[str, dict[str, Any]] = {
    "surrogate": {"surrogate": "none"},
    "universal-nes": {"universal_queries": 0},
    "re-scoring": {"rescoring": False},
    "eps-uni": {"eps_uni_runs": 0},
    "eps-adv": {"eps_adv": False},
    "corruption": {"noise_sizes": ()},
    "edits": {"edits": ()},
    "classes": {"class_wise": False},
    "certified": {"certified": False},
    "jacobian": {"jacobian_backwards": 0},
}
"""Settings of an audit without a stage that was stopped."""


class TimeSpent(BudgetSpent):
    """The time of an audit is over."""


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return monotonic()


class Remaining:
    """What is still to be done of an audit, in seconds of a model's measured speed.

    Args:
        data: the data.
        speed: of the model.
        black_box: whether it is one.
        mine: attacks of the user's own.
    """

    def __init__(self, data: Dataset, speed: Speed, *, black_box: bool, mine: Sequence[Any] = ()) -> None:
        self.data, self.speed, self.black_box, self.mine = data, speed, black_box, mine
        self.done: set[str] = set()
        """Parts of the costs that have begun."""
        self.points = self.tried = 0
        """How many eps of the curve, and how many attacks of the user's own, are done."""
        self.ran: set[str] = set()
        """Checks that have run."""

    def end(self, part: str, check: str = "") -> None:
        """Record that a stage is done."""
        self.points += part == CURVE
        self.tried += part == OWN
        self.ran |= {check} if check else set()
        self.done.add(part)

    def seconds(self, suite: Suite) -> float:
        """Return how long the rest takes at the most."""
        return sum(self._share(part.name, suite) * self.speed.seconds(part) for part in self._parts(suite))

    def _parts(self, suite: Suite) -> tuple[Part, ...]:
        if self.black_box:
            return asked_parts(suite, self.data, suite.votes if self.speed.random else 1)
        return parts_of(suite, self.data, random=self.speed.random, ran=self.ran, mine=self.mine[self.tried :])

    def _share(self, part: str, suite: Suite) -> float:
        if part == CURVE:
            return max(0, len(suite.eps) - self.points) / len(suite.eps)
        if part == OWN:  # only those that are left have been counted
            return 1.0
        if part == CHECKED:
            return 1 - len(self.ran & set(CHECKS)) / len(CHECKS) if self.black_box else 1.0
        return float(_STAGE_OF.get(part, part) not in self.done)


class Clock:
    """The time that an audit has, and what its stages take of it.

    Args:
        minutes: of the whole audit.
        model: the model that is audited, which a few batches are timed of.
        data: with the splits of the audit.
        asked: the suite, which is the most that is done.
        seed: of the audit.
        began: when it began, by :func:`now`.
        attacks: the user's own, beside those that the suite names.
    """

    def __init__(
        self,
        minutes: float,
        model: nn.Module,
        data: Dataset,
        asked: Suite,
        *,
        seed: int = 0,
        began: float | None = None,
        attacks: Sequence[Any] = (),
    ) -> None:
        self.minutes, self.data = minutes, data
        self._began = now() if began is None else began
        self._keep_eps = bool(asked.eps)  # the user named them
        self.asked = asked.on(data).model_copy(update={"minutes": None, "middle_first": True})
        if isinstance(model, BlackBox):
            self.asked = self.asked.model_copy(update={"universal_queries": 0})
        mine = [one.attack for one in own.of(self.asked, attacks).values()]
        self.untouched = untouched_copy(model)
        """A copy of the model as it was before its time was taken."""
        speed = measured(model, data, self.asked, seed)
        self.rest = Remaining(data, speed, black_box=isinstance(model, BlackBox), mine=mine)
        self._earlier = self._expected = self._took = 0.0
        self.bound = False
        """Whether a stage is stopped where the time is over."""
        self.kept = 0.0
        """Seconds that a stage then leaves to those after it."""

    @property
    def spent(self) -> float:
        """Seconds so far, those of earlier runs included."""
        return self._earlier + now() - self._began

    @property
    def left(self) -> float:
        """Seconds left."""
        return 60 * self.minutes - self.spent

    def check(self) -> None:
        """Stop a stage where the time is over, see :attr:`bound`.

        Raises:
            TimeSpent: it is.
        """
        if self.bound and self.left < _MARGIN * 60 * self.minutes + self.kept:
            later = ", but for what the stages after it need" if self.kept else ""
            raise TimeSpent(f"the {minutes_of(self.minutes)} of the audit are over{later}")

    def goes_on(self, spent: float) -> None:
        """Count the seconds of an earlier run."""
        self._earlier = spent

    def choose(self) -> Suite:
        """Return the suite that says most in this time.

        Raises:
            UserError: even the smallest audit takes longer.
        """
        suite, fits = self._fit(None)
        if not fits:
            whole = self.seconds(suite)
            least = (self.spent + whole / (1 - RESERVE)) / 60
            step = 10.0 ** (math.floor(math.log10(least)) - 1)
            fewer = " or fewer --eps" if self._keep_eps and len(suite.eps) > 1 else ""
            speed = self.rest.speed
            back = "" if self.rest.black_box else f", {speed.gradient:.2g} s a gradient"
            raise UserError(
                f"{minutes_of(self.minutes)} is too short: the smallest audit of this model takes about {whole:.2g} s "
                f"on this machine ({speed.forward:.2g} s an image forward{back}); give --minutes "
                f"{math.ceil(least / step) * step:.3g}{fewer}"
            )
        return suite

    def begin(self, suite: Suite, part: str) -> Suite:
        """Choose again for a stage that begins and those after it. The settings of this part then stay."""
        if part != CURVE and CURVE in self.rest.done:
            self._keep_eps = True  # the curve is over
        if not 1 - 2 * RESERVE <= self.seconds(suite) / max(self.left, 1e-9) <= 1 - RESERVE:  # else it fits as it is
            suite = self._fit(suite)[0]
        self.rest.done.add(part)
        return suite

    def end(self, part: str, check: str = "", *, seconds: float = 0.0, asked: Part | None = None) -> None:
        """Record a stage, how long it took, and what it asked of the model; a stored one took nothing."""
        self.rest.end(part, check)
        if asked is not None:
            self._took += seconds
            self._expected += self.rest.speed.seconds(asked)

    def seconds(self, suite: Suite) -> float:
        """Return how long the rest of an audit takes at the most, at the pace so far."""
        prior = _PRIOR * 60 * self.minutes
        return (self._took + prior) / (self._expected + prior) * self.rest.seconds(suite)

    def _fit(self, suite: Suite | None) -> tuple[Suite, bool]:
        rest, asked = self.rest, self.asked
        fixed = {name for part in rest.done for name in _SETTINGS_OF.get(part, ())}
        fixed |= {"eps"} if self._keep_eps else set()
        if rest.black_box and "per image" in rest.done:
            fixed |= {"sample", "queries"}
        if suite is not None:
            asked = asked.model_copy(update={name: getattr(suite, name) for name in fixed})
        least = {"eps": max(1, rest.points), "checks": len(rest.ran & set(CHECKS))}
        room = Budget(self.seconds, self.left)
        return fit(asked, self.data, [room], TIME_LADDER, fixed=fixed, least=least)


def minutes_of(minutes: float) -> str:
    """Format minutes."""
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"


def said_of(clock: Clock, suite: Suite, stopped: Collection[str], middle: UniversalResult) -> tuple[list[str], str]:
    """Return what the time made smaller, as notes, and as the sentence of the verdict.

    Args:
        clock: of the audit.
        suite: as it was in the end.
        stopped: stages that were stopped when the time was over.
        middle: the perturbation of the middle eps, for how much wider its interval is.
    """
    asked, time_ = clock.asked, minutes_of(clock.minutes)
    total, seen = len(clock.data.test), middle.uer.n
    if asked.test_images is not None:
        total = min(total, asked.test_images)
    made = changes(asked, suite)
    notes = [f"The {time_} made the audit smaller: {made}."] if made else []
    parts = [*omitted(asked, suite), *(name for name in stopped if not name.startswith("check "))]
    checks = len(CHECKS) if asked.checks == "all" else len(asked.checks)
    ran = checks if suite.checks == "all" else len(suite.checks)
    parts += [f"{checks - ran} of {checks} checks"] if ran < checks else []
    sentence = f"The {time_} left out {listed(parts)}." if parts else ""
    if suite.test_images is not None and seen < total and clock.data.test.task.per_image_label:
        whole = Rate.of(round(middle.uer.value * total), total)
        half, least = ((rate.high - rate.low) / 2 for rate in (middle.uer, whole))
        width = (
            f"On {seen:,} of {total:,} test images the 95 % interval of the UER is ± {100 * half:.1f} points; on all "
            f"of them it would be ± {100 * least:.1f}."
        )
        notes.append(width)
        sentence = f"{sentence} {width}".strip()
    return notes, sentence
