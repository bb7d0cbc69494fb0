"""The audit of a model: what it takes and returns, and the data that it reports on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.auditor import Auditor
from gambeson.auditing.clock import Clock, now
from gambeson.auditing.context import STAGES, AuditContext, Checkpoints, Outcomes, untouched_copy
from gambeson.auditing.cost import Speed
from gambeson.auditing.diagnostics import DIAGNOSTICS, Diagnostic, get
from gambeson.auditing.results import AuditResult, ModelInfo, Verdict
from gambeson.auditing.stages import black_box as boxes
from gambeson.auditing.stages import certified, own, surrogate
from gambeson.auditing.stages.examples import FILE
from gambeson.auditing.suite import SUITES, Suite
from gambeson.base import UserError, as_text, refuse_foreign, say, seeded, unknown_name
from gambeson.data import Dataset, Split, as_dataset, disjoint
from gambeson.evaluation import BlackBox
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.universal import accuracy_rate
from gambeson.models import count_parameters, fingerprint
from gambeson.victim import Victim, nothing_counts, predict, score
from gambeson.victim.temperature import temperature


@dataclass(frozen=True, repr=False)
class Audit:
    """Result of :func:`audit`."""

    results: AuditResult
    """Every number, with its interval, settings and cost."""
    perturbations: list[UniversalPerturbation]
    """The crafted perturbations, in order of eps."""
    outcomes: Outcomes = field(default_factory=Outcomes)
    """What each test image answers under the attacks."""

    @classmethod
    def finished(cls, folder: Path) -> Audit | None:
        """Return the finished audit of a folder; None if there is none, or one of its files was deleted."""
        if not (folder / "result.json").is_file():
            return None
        result = AuditResult.load(folder)
        files = [FILE, *(point.file for point in result.universal)]
        files += [part.file for part in (result.jacobian, result.classes) if part is not None]
        if not all((folder / file).exists() for file in files):
            return None
        uaps = [UniversalPerturbation.load(folder / point.file) for point in result.universal]
        return cls(result, uaps, Outcomes(folder))

    @property
    def verdict(self) -> Verdict:
        """``.trusted``, ``.summary`` and ``.reasons``."""
        return self.results.verdict

    def __repr__(self) -> str:
        return f"{self.results!r}\n{self.verdict.summary}"

    def _repr_html_(self) -> str:
        return f"{self.results._repr_html_()}<p>{escape(self.verdict.summary)}</p>"

    def plot(self) -> Any:
        """Return a ``plotly`` figure; see :meth:`AuditResult.plot`."""
        return self.results.plot()

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame``; see :meth:`AuditResult.to_frame`."""
        return self.results.to_frame()


def audit(
    model: nn.Module,
    data: object,
    suite: str | Suite | None = None,
    out: str | Path | None = None,
    *,
    minutes: float | None = None,
    attacks: Sequence[Any] = (),
    seed: int = 0,
    label: str = "model",
    defense: dict[str, Any] | None = None,
    epochs: int | None = None,
) -> Audit:
    """Measure whether one perturbation breaks a model, and check whether the result can be trusted.

    Universal perturbations are crafted on train, selected on validation and reported on test, at every eps of the
    suite's curve, together with controls; eps_uni is searched; per-image attacks, transfer from a surrogate and
    corruption noise follow; the diagnostics of :mod:`gambeson.auditing.diagnostics` look for signs that the numbers
    cannot be trusted.

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits; its state is restored.
        data: a ``Dataset``, or a split or (images, labels) pair, which are split by a fixed rule.
        suite: ``glance``, ``quick``, ``standard``, ``full``, or a :class:`Suite`; None: ``standard``, or ``full`` if
            ``minutes`` is given.
        out: folder for ``result.json``, the perturbations and ``examples.safetensors``; an interrupted audit resumes
            there after its last finished stage.
        minutes: time limit of the whole audit; the suite is reduced to fit it (:attr:`Suite.minutes`).
        attacks: your own, run in addition to the suite's: objects such as ``PGD(eps=0.1)``, of any class with
            ``__call__(model, x, y, *, seed, task)`` or of a :class:`UniversalAttack`, or functions. The verdict counts
            those at the middle eps.
        seed: of every draw.
        label: name of the model in tables.
        defense: the settings of its training, if known.
        epochs: of its training, if known.

    Raises:
        UserError: unknown suite, something that is no attack, too few minutes for the smallest audit, a model and data
            that do not fit each other, or a folder that holds anything but this audit.
    """
    began = now()
    suite = suite_named(suite, minutes)
    dataset = as_dataset(data)
    clock = None
    if suite.minutes is not None:
        clock = Clock(suite.minutes, model, dataset, suite, seed=seed, began=began, attacks=attacks)
    return run_stages(
        model,
        dataset,
        suite,
        out,
        attacks=attacks,
        seed=seed,
        label=label,
        defense=defense,
        epochs=epochs,
        clock=clock,
    )


def suite_named(suite: str | Suite | None, minutes: float | None = None) -> Suite:
    """Return a suite by its name, with a time for the whole audit.

    Raises:
        UserError: it is unknown, or the time is not a positive number.
    """
    if suite is None:
        suite = "standard" if minutes is None else "full"
    if not isinstance(suite, Suite):
        if not isinstance(suite, str) or suite not in SUITES:
            raise unknown_name("suite", suite, SUITES)
        suite = SUITES[suite]
    return suite if minutes is None else Suite(**(dict(suite) | {"minutes": minutes}))


def run_stages(
    model: nn.Module,
    dataset: Dataset,
    suite: Suite,
    out: str | Path | None,
    *,
    attacks: Sequence[Any] = (),
    seed: int = 0,
    label: str = "model",
    defense: dict[str, Any] | None = None,
    epochs: int | None = None,
    clock: Clock | None = None,
) -> Audit:
    """As :func:`audit`, against a clock that runs already."""
    keep_eps, suite = bool(suite.eps), suite.on(dataset).model_copy(update={"minutes": None})
    diagnostics, mine = diagnostics_of(suite), own.of(suite, attacks)
    surrogate.check(suite, dataset, model)
    certified.check(suite, dataset, model)
    folder = None if out is None else Path(as_text(out))
    if folder is not None:
        refuse_foreign(folder, "audit", STAGES, Outcomes.FILE, boxes.QUERIES)
    black_box = isinstance(model, BlackBox)
    if black_box and mine:
        raise UserError("attacks of your own are for models with gradients, and this is a black box: leave them out")
    stages, notes, asked = Checkpoints(folder, seed), list[str](), suite
    for name, one in mine.items():
        if not one.described:
            stages.forget(name)
    if suite.budget is not None and not black_box:
        raise UserError("a budget limits the queries to a black box, and this model is none: leave suite.budget out")
    weights = {} if black_box else {"model": fingerprint(model)}
    stages.begin(seed=seed, suite=suite.plain(), **weights)
    choose = None if clock is None else partial(_in_time, clock, stages)
    untouched = untouched_copy(model) if clock is None else clock.untouched
    with Victim(model, fast=not black_box) as victim:
        stages.meter = lambda: Cost(forwards=victim.forwards, backwards=victim.backwards)
        victim.allow_no_graph = True  # "no vanishing gradients" reports it
        if isinstance(model, BlackBox):
            suite, dataset, notes = boxes.inspect(
                victim, model, suite, dataset, stages, folder, keep_eps=keep_eps, choose=choose
            )
            for note in notes:  # what a budget leaves out is said before it is spent
                say(f"note: {note}")
        elif choose is not None:
            suite = choose(suite)
        reported, twice = _reported(dataset, suite, seed, victim.device)
        others = {"train": dataset.train.sign, "validation": dataset.validation.sign}
        stages.begin(images=reported.test.fingerprint, **others)
        if clock is not None and folder is not None and not mine and (done := Audit.finished(folder)):
            return done  # what it measured again in another time would be another audit
        traits = victim.inspect(reported.test.take(slice(0, 8), victim.device)[0], scores=black_box)
        for part in (reported.train, reported.validation, reported.test):
            part.check_logits(traits.shape)
        victim.votes = suite.votes if traits.stochastic else 1
        victim.temperature = 1.0 if black_box else temperature(victim, reported.validation, seed)
        began = now()
        clean_images = partial(predict, victim, reported.test, seed=seed)
        if black_box:  # queries spent are recorded
            predictions = torch.tensor(stages.do("clean", list[int], lambda: clean_images().tolist()))
        else:
            with seeded(seed, "stage", "clean"):  # for a model whose noise decides hardly an answer
                predictions = clean_images()
        each = (now() - began) / len(reported.test) / victim.votes
        speed = Speed(forward=each, gradient=_GRADIENT * each, surrogate=each, random=traits.stochastic)
        if clock is not None:
            speed = clock.rest.speed
            clock.end("start")
            victim.before_call = clock.check
        context = AuditContext(
            victim=victim,
            data=reported,
            suite=suite,
            seed=seed,
            subject=ModelInfo(
                label=label,
                name=getattr(getattr(model, "card", None), "name", type(model).__name__),
                parameters=count_parameters(model),
                fingerprint=fingerprint(model),
                black_box=black_box,
                random=traits.stochastic,
                defense=defense,
                epochs=epochs,
            ),
            clean=accuracy_rate(clean := score(predictions, reported.test)),
            predictions=predictions,
            untouched=untouched,
            outcomes=Outcomes(folder),
        )
        context.outcomes.keep("clean", clean.counts, reported.test)
        stages.charge("start", stages.meter() - stages.asked)
        notes = [*notes, *twice]
        result = Auditor(context, folder, stages, notes, diagnostics, mine, asked, speed, clock).run()
        return Audit(result, [context.uaps[point.eps] for point in result.universal], context.outcomes)


_GRADIENT = 3.0
"""Forwards that a gradient takes as long as, where nothing was timed."""


def _in_time(clock: Clock, stages: Checkpoints, suite: Suite) -> Suite:
    """Return what of a suite fits the time: as the audit of this folder has chosen before, or chosen now."""
    clock.asked = suite.model_copy(update={"middle_first": True})
    if (before := stages.kept("clock")) is not None:
        clock.goes_on(before["spent"])
        return Suite(**before["suite"])
    chosen = clock.choose()
    stages.keep("clock", {"suite": chosen.plain(), "spent": clock.spent})
    return chosen


def diagnostics_of(suite: Suite) -> list[Diagnostic]:
    """Return the built-in diagnostics, those that the suite leaves out too, and those named by the suite."""
    for name in () if suite.checks == "all" else suite.checks:
        if name not in {diagnostic.name for diagnostic in DIAGNOSTICS}:
            raise unknown_name("check", name, [diagnostic.name for diagnostic in DIAGNOSTICS])
    every = [*DIAGNOSTICS, *(get(name) for name in suite.diagnostics)]
    names = [diagnostic.name for diagnostic in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two diagnostics are called {twice[0]!r}: name each of suite.diagnostics once, none of ours")
    return every


def _reported(data: Dataset, suite: Suite, seed: int, device: torch.device) -> tuple[Dataset, list[str]]:
    """The data with the suite's number of validation and test images, and notes on excluded ones."""
    validation = _few(_labelled(data.validation), suite.validation_images, seed)
    test = _few(_labelled(data.test), suite.test_images, seed)
    found = disjoint(Dataset(data.name, data.train, validation, test, data.classes))
    parts = (("validation", validation, found.validation, "train"), ("test", test, found.test, "train or validation"))
    notes = [
        f"{len(before) - len(after)} of {len(before)} {part} images were left out: they also occur in {where}."
        for part, before, after, where in parts
        if len(after) < len(before)
    ]
    return Dataset(data.name, data.train, found.validation, found.test.to(device), data.classes), notes


def _labelled(split: Split) -> Split:
    """Leave out images without a label that counts."""
    if split.task.all_count:
        return split
    counted = split.task.labelled(split.labels)
    if not bool(counted.any()):
        raise nothing_counts(split)
    return split if bool(counted.all()) else split.subset(counted.nonzero().flatten(), split.name)


def _few(split: Split, images: int | None, seed: int) -> Split:
    return split if images is None else split.sample(images, seed=seed)
