"""The run of an audit: its stages and diagnostics one after the other, each stored, and the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import steadiness
from gambeson.auditing.amounts import CHECKS
from gambeson.auditing.budget import lost, omitted
from gambeson.auditing.clock import BY_WORTH, CHECKED, CURVE, OWN, STOPPED, Clock, Remaining, TimeSpent, now, said_of
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.cost import Part, Speed
from gambeson.auditing.diagnostics import DIAGNOSTICS, Diagnostic
from gambeson.auditing.display import in_a_line, worst_attack
from gambeson.auditing.jacobian_results import JacobianResult
from gambeson.auditing.results import (
    NOT_RUN,
    AdaptiveResult,
    AuditResult,
    CertifiedResult,
    Check,
    Corruption,
    DataInfo,
    IoU,
    PerImageResult,
    RandomnessResult,
    Surrogate,
    TargetedResult,
    TransferredResult,
    UniversalResult,
)
from gambeson.auditing.stages import (
    adaptive,
    certified,
    classes,
    corruption,
    edits,
    jacobian,
    own,
    per_image,
    randomness,
    surrogate,
    targeted,
    transfer,
    universal,
)
from gambeson.auditing.stages import black_box as boxes
from gambeson.auditing.stages.examples import save_examples
from gambeson.auditing.suite import Suite
from gambeson.auditing.verdict import eps_in_words, judge
from gambeson.base import UserError, environment, say, task, watched
from gambeson.evaluation import BlackBox, BudgetSpent
from gambeson.evaluation.classes import ClassView
from gambeson.evaluation.edits import EditsResult
from gambeson.evaluation.rates import EpsAdv, EpsUni
from gambeson.models import fingerprint


@dataclass(frozen=True)
class _Stage:
    """A stage of an audit."""

    name: str
    """What its result is stored under."""
    part: str
    """Of the costs, see :func:`gambeson.auditing.cost.parts_of`."""
    run: Callable[[], str | None]
    """Measures; returns a line for those who watch, if there is something to tell."""
    check: str = ""
    """The check that it runs."""


_MINUTE = 60.0
"""Seconds that one waits for a first answer."""
_LITTLE = 1e-3
"""What every stage takes, as a share of the time."""


class Auditor:
    """Runs the stages, storing each in the folder when it is finished."""

    def __init__(
        self,
        context: AuditContext,
        folder: Path | None,
        stages: Checkpoints,
        notes: list[str],
        diagnostics: list[Diagnostic],
        mine: dict[str, own.Own],
        asked: Suite,
        speed: Speed,
        clock: Clock | None = None,
    ) -> None:
        self.context, self.folder, self.stages, self.notes = context, folder, stages, notes
        self.diagnostics, self.mine, self.asked, self.clock = diagnostics, mine, asked, clock
        self.speed = speed
        self.curve_over = False
        self.queried: universal.Queried | None = None
        self.source = Surrogate(name="")
        self.found: EpsUni | None = None
        self.each: EpsAdv | None = None
        self.aimed: list[TargetedResult] = []
        self.noise: list[Corruption] = []
        self.edited: EditsResult | None = None
        self.classes: ClassView | None = None
        self.bounds: list[CertifiedResult] = []
        self.jacobians: JacobianResult | None = None
        self.checks: dict[str, Check] = {}
        self.unchecked: dict[str, Check] = {}

    def run(self) -> AuditResult:
        """Return the result, which is stored too."""
        todo = self._todo()
        costs, seen = self._costs(todo), watched()
        total = sum(costs)
        stored = [self.stages.has(stage.name) for stage in todo]
        before = sum(cost for cost, known in zip(costs, stored, strict=True) if known)
        with task(f"audit {self.context.subject.label}", 100, done=100 * before / total) as advance:
            if seen:
                self._first_answer(todo, costs, stored)
            for stage, cost, known in zip(todo, costs, stored, strict=True):
                line = self._take(stage, known=known)
                if not known:
                    advance(100 * cost / total)
                    if line and seen:
                        say(line)
        return self._result()

    def _first_answer(self, todo: list[_Stage], costs: list[float], stored: list[bool]) -> None:
        """Tell about the middle eps before its stage does, where that takes more than a minute."""
        context = self.context
        ahead = [stage.name for stage in todo].index(universal.file_of(context.eps)) + 1
        wait = sum(cost for cost, known in zip(costs[:ahead], stored[:ahead], strict=True) if not known)
        if wait > _MINUTE and not context.subject.black_box:
            say(universal.first_answer(context, self.speed))

    def _todo(self) -> list[_Stage]:
        """The stages in their order; against the clock, those come first that tell most for their time."""
        suite, clock = self.context.suite, self.clock
        grid = suite.eps if clock is None else clock.asked.eps
        if suite.middle_first:
            grid = tuple(sorted(grid, key=lambda eps: (abs(grid.index(eps) - len(grid) // 2), eps)))
        todo = [
            _Stage("surrogate", "surrogate", self._surrogate),
            _Stage("randomness", "randomness", self._randomness),
            _Stage("universal-nes", "universal NES", self._by_queries),
            *(_Stage(universal.file_of(eps), CURVE, partial(self._point, eps)) for eps in grid),
            _Stage("re-scoring", "re-scoring", self._rescore),
            _Stage("eps-uni", "eps_uni", self._eps_uni),
            _Stage("eps-adv", "eps_adv", self._eps_adv),
            _Stage("per-image", "per image", self._per_image),
            _Stage("targets", "targets", self._targets),
            _Stage("transfer", "transfer", self._transfer),
            *(_Stage(name, OWN, partial(self._own, name, one)) for name, one in self.mine.items()),
            _Stage("corruption", "noise", self._corruption),
            _Stage("edits", "edits", self._edits),
            _Stage("classes", "classes", self._classes),
            _Stage("certified", "certified", self._certified),
            _Stage("jacobian", "Jacobian analysis", self._jacobian),
        ]
        checks = [_Stage(f"check {one.name}", CHECKED, partial(self._check, one), one.name) for one in self.diagnostics]
        if clock is None:
            return todo + checks
        ranks = {name: rank for rank, name in enumerate(CHECKS)}
        checks.sort(key=lambda stage: ranks.get(stage.check, len(ranks)))
        return sorted(todo + checks, key=lambda stage: BY_WORTH.index(stage.part))

    def _costs(self, todo: list[_Stage]) -> list[float]:
        """How many seconds each stage takes at the most."""
        context = self.context
        suite, mine = context.suite, [one.attack for one in self.mine.values()]
        rest = Remaining(context.data, self.speed, black_box=context.subject.black_box, mine=mine)
        left = [rest.seconds(suite)]
        for stage in todo:
            rest.end(stage.part, stage.check)
            left.append(rest.seconds(suite))
        spans = [max(0.0, before - after) for before, after in pairwise(left)]
        little = _LITTLE * sum(spans) or 1.0
        return [span + little for span in spans]

    def _take(self, stage: _Stage, *, known: bool) -> str | None:
        """Run a stage; against the clock, with settings that fit the time left."""
        context, clock = self.context, self.clock
        if clock is None:
            return stage.run()
        if not known:
            context.suite = clock.begin(context.suite, stage.part)
            self.stages.keep("clock", {"suite": context.suite.plain(), "spent": clock.spent})
        training = stage.part == "surrogate"
        clock.bound = training or bool(context.universal)  # without one perturbation there is nothing to say
        clock.kept = clock.seconds(context.suite) if training else 0.0
        if any(stage.check == one.name and "adaptive" in one.needs for one in self.diagnostics):
            clock.kept = clock.left / 2  # attacks that few models call for take no more than half of what is left
        before, began = context.spent, now()
        line = stage.run()
        clock.bound = False
        took = context.since(before)
        asked = Part(name=stage.part, forwards=took.forwards - took.backwards, gradients=took.backwards)
        seen = not known and stage.part not in ("surrogate", OWN)
        clock.end(stage.part, stage.check, seconds=now() - began, asked=asked if seen else None)
        return line

    def _surrogate(self) -> None:
        context, victim = self.context, self.context.victim
        try:
            context.surrogate, self.source = surrogate.obtain(
                context.suite,
                context.data,
                victim.model,
                self.folder,
                self.stages,
                context.seed,
                victim.before_call,
            )
        except BudgetSpent as spent:
            self.stages.left_out["surrogate"] = spent
            self.source = Surrogate(
                name="", left_out="No perturbation was transferred: training the surrogate took too long."
            )
            context.suite = context.suite.model_copy(update={"surrogate": "none"})

    def _randomness(self) -> None:
        context = self.context
        context.randomness = self.stages.afford(
            "randomness", RandomnessResult | None, lambda: randomness.measure(context), None
        )
        steadiness.begin(context, self.stages)

    def _by_queries(self) -> None:
        context, folder = self.context, self.folder
        craft = partial(universal.craft_by_queries, context, folder)
        self.queried = self.stages.afford("universal-nes", universal.Queried | None, craft, None)
        if self.queried is not None and folder is not None:
            context.queried = UniversalPerturbation.load(folder / self.queried.file)

    def _point(self, eps: float) -> str | None:
        context = self.context
        if self.curve_over or eps not in context.suite.eps:
            return None
        craft = partial(universal.craft_point, context, eps, self.folder)
        point = self.stages.afford(universal.file_of(eps), UniversalResult | None, craft, None)
        if point is None:
            self.curve_over = True
            return None
        self._recall(eps)
        context.universal.append(point)
        context.universal.sort(key=lambda one: one.eps)
        return in_a_line(point)

    def _rescore(self) -> None:
        context = self.context
        universal.end_curve(context, self.stages.left_out)
        again = partial(universal.rescore, context)
        context.universal = self.stages.afford("re-scoring", list[UniversalResult], again, context.universal)

    def _eps_uni(self) -> str:
        context = self.context
        found = self.stages.afford("eps-uni", EpsUni | None, lambda: universal.search_eps_uni(context), None)
        self.found = found or universal.search_eps_uni(context, runs=0)
        return eps_in_words(self.found, None)

    def _eps_adv(self) -> None:
        self.each = self.stages.afford("eps-adv", EpsAdv | None, lambda: universal.search_eps_adv(self.context), None)

    def _per_image(self) -> str | None:
        context = self.context
        context.per_image = self.stages.afford(
            "per-image", list[PerImageResult], lambda: per_image.measure(context), []
        )
        worst = worst_attack(context.middle, context.per_image, [])
        return None if worst is None else f"per image: accuracy {worst.accuracy} under {worst.attack}"

    def _targets(self) -> None:
        self.aimed = targeted.measure(self.context, self.stages, self.folder)

    def _transfer(self) -> None:
        context = self.context
        context.transfer += self.stages.afford(
            "transfer", list[TransferredResult], lambda: transfer.measure(context), []
        )

    def _own(self, name: str, one: own.Own) -> None:
        work = partial(one.run, self.context)
        added = self.stages.afford(name, PerImageResult | TransferredResult | None, work, None)
        if isinstance(added, PerImageResult):
            self.context.per_image.append(added)
        elif added is not None:
            self.context.transfer.append(added)

    def _corruption(self) -> None:
        self.noise = self.stages.afford(
            "corruption", list[Corruption], lambda: corruption.measure(self.context), list[Corruption]()
        )

    def _edits(self) -> None:
        self.edited = self.stages.afford("edits", EditsResult | None, lambda: edits.measure(self.context), None)

    def _classes(self) -> None:
        measure = partial(classes.measure, self.context, self.folder)
        self.classes = self.stages.afford("classes", ClassView | None, measure, None)

    def _certified(self) -> None:
        work = partial(certified.measure, self.context)
        self.bounds = self.stages.afford("certified", list[CertifiedResult], work, [])

    def _jacobian(self) -> None:
        self.jacobians = self.stages.afford("jacobian", JacobianResult | None, self._measure_jacobian, None)

    def _check(self, diagnostic: Diagnostic) -> str | None:
        name = diagnostic.name
        found = blank = Check(name=name, passed=None, detail=NOT_RUN[0])
        if self._selected(diagnostic):
            found = blank = Check(name=name, passed=None, detail=NOT_RUN[1])
            if "adaptive" in diagnostic.needs and self.context.adaptive is None:  # stored apart: its attacks count
                work = partial(adaptive.measure, self.context)
                adaptive.record(self.context, self.stages.afford("adaptive", AdaptiveResult | None, work, None))
            if not {*self.stages.left_out, *lost(self.asked, self.context.suite)}.intersection(diagnostic.needs):
                found = self.stages.afford(f"check {name}", Check, partial(diagnostic.check, self.context), blank)
        (self.unchecked if found is blank else self.checks)[name] = found
        return f"check failed: {name}" if found.passed is False else None

    def _selected(self, diagnostic: Diagnostic) -> bool:
        applies = not (diagnostic.gradients and self.context.subject.black_box)
        return self.context.suite.runs(diagnostic.name) or diagnostic not in DIAGNOSTICS or not applies

    def _result(self) -> AuditResult:
        context, folder, stages, clock = self.context, self.folder, self.stages, self.clock
        victim, suite = context.victim, context.suite
        if self.found is None:
            raise AssertionError("eps_uni is a stage of every audit")
        if folder is not None:
            uap = context.uaps[context.eps]
            clean = context.test.counts(context.predictions)
            before, after = (one.wrong / one.total.clamp(min=1) for one in (clean, context.counts[context.eps]))
            shown = partial(save_examples, folder, victim, context.test, uap, before, after)
            curve = [context.uaps[eps] for eps in suite.eps]
            stages.afford("examples", None, lambda: shown(curve=curve, targeted=context.targeted), None)
        without = [self.source.left_out, per_image.left_out(context)]
        if suite.jacobian_backwards and not context.subject.black_box and not context.test.task.per_image_label:
            without.append(jacobian.left_out(context.test))
        budgeted = [name for name, why in stages.left_out.items() if not isinstance(why, TimeSpent)]
        said = boxes.left_out([*omitted(self.asked, suite if clock is None else clock.asked), *budgeted], suite.budget)
        notes: list[str] = []
        if clock is not None:
            suite = context.suite = suite.model_copy(update=self._as_run())
            stopped = [name for name in stages.left_out if name not in budgeted and name not in STOPPED]
            notes, sentence = said_of(clock, suite, stopped, context.middle)
            said = f"{said} {sentence}".strip()
        every = self.checks | self.unchecked
        result = AuditResult(
            subject=context.subject,
            material=DataInfo.of(context.data),
            seed=context.seed,
            settings=suite.plain(),
            minutes=None if clock is None else clock.minutes,
            clean=context.clean,
            iou=(iou := IoU.of(context.predictions, context.test)),
            temperature=victim.temperature or 1.0,
            per_image=context.per_image,
            universal=context.universal,
            eps_uni=self.found,
            eps_adv=self.each,
            targeted=self.aimed,
            transfer=context.transfer,
            surrogate=self.source,
            corruption=self.noise,
            edits=self.edited,
            classes=self.classes,
            certified=self.bounds,
            randomness=context.randomness,
            jacobian=self.jacobians,
            checks=[every[one.name] for one in self.diagnostics],
            notes=[
                *self.notes,
                *notes,
                *stages.notes(),
                *boxes.remarks(victim.model, suite),
                *filter(None, without),
            ],
            verdict=judge(
                context.clean,
                context.universal,
                self.found,
                list(self.checks.values()),
                per_image=context.per_image,
                transfer=context.transfer,
                subject=context.subject,
                randomness=context.randomness,
                each=self.each,
                left_out=said,
                unchecked=[one.name for one in self.diagnostics if one.name in self.unchecked],
                targeted=self.aimed,
                unit=context.test.task.unit,
                iou=iou,
                classes=self.classes,
                certified=self.bounds,
            ),
            cost=stages.cost,
            environment=environment(victim.device),
        )
        if folder is not None:
            result.save(folder)
        if isinstance(victim.model, BlackBox):
            victim.model.settle()
        return result

    def _as_run(self) -> dict[str, Any]:
        """Settings of what the clock left out or stopped, so that the same can be run again without it."""
        found: dict[str, Any] = {}
        if self.unchecked:
            found["checks"] = tuple(one.name for one in DIAGNOSTICS if one.name in self.checks)
        for name, settings in STOPPED.items():
            found |= settings if name in self.stages.left_out else {}
        if not any(one.attack == "standard" for one in self.context.per_image):
            found["suite_images"] = 0
        return found

    def _measure_jacobian(self) -> JacobianResult | None:
        context = self.context
        deltas = {eps: uap.delta for eps, uap in context.uaps.items()}
        return jacobian.measure(
            context.victim,
            context.sample,
            deltas,
            context.suite,
            eps=context.eps,
            seed=context.seed,
            folder=self.folder,
        )

    def _recall(self, eps: float) -> None:
        """Load the perturbation of a stored stage."""
        context = self.context
        if eps in context.uaps:
            return
        if self.folder is None:
            raise AssertionError("a stage can only be stored in a folder")
        universal.recall(context, eps, self.folder)
        if fingerprint(context.victim.model) not in context.uaps[eps].about.model.split("+"):
            raise UserError(f"{self.folder} holds the audit of another model: choose another --out")
