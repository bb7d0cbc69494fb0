"""Hardening of a model: fine-tuning with the preset ``gambeson``, the choice of an epoch, an audit before and after."""

from __future__ import annotations

import math
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from gambeson import report
from gambeson.auditing import SUITES, Audit, Suite, audit, compare
from gambeson.auditing.clock import Clock, minutes_of, now
from gambeson.auditing.cost import plan as plan_of_audit
from gambeson.base import (
    UserError,
    as_text,
    count,
    duration,
    environment,
    read_json,
    refuse_foreign,
    refuse_other,
    save_tensors,
    say,
    seeded,
    write_json,
)
from gambeson.base.errors import DataWarning
from gambeson.data import Dataset, as_dataset
from gambeson.defenses import Gambeson
from gambeson.evaluation import BlackBox
from gambeson.hardening.collapse import collapsed
from gambeson.hardening.result import Hardened, validated
from gambeson.hardening.settings import Hardening, HardenPlan, Schedule
from gambeson.models import PixelModel, fingerprint
from gambeson.models import save as save_model
from gambeson.models.storage import CLASS_NAMES, FILE_NAME
from gambeson.threat import default_eps
from gambeson.training import Recipe, plan, train
from gambeson.training.loop import History, NoEpochError
from gambeson.training.recipe import fitted
from gambeson.training.validation import ACCURACY, chance_level, rank, validate, validate_robustly
from gambeson.victim import copied
from gambeson.victim.inspect import require_module

BEFORE, AFTER = "original", "hardened"
"""Names of the two models in the report, and folders of their audits."""
PAGE, RESULT, SCHEDULE = "report.html", "result.json", "schedule.json"
LR = 0.05
"""Learning rate of fine-tuning (ours)."""
TRAINING = 0.5
"""Part of the time that is for the training; each audit has half of the rest (ours)."""
LOOKS = 8
"""How often the attacks of validation look at the model, at the most (ours)."""
_SLACK = 0.9
"""Part of its time that a training is planned to fill, since a machine's pace varies."""
_LOOK = 50 * 128 + 500 * 10
"""Image gradients of one look: see :func:`gambeson.training.validation.validate_robustly`."""


def harden(
    model: nn.Module, data: object, *, out: str | Path | None = None, title: str = "", **settings: Any
) -> Hardened:
    """Fine-tune a copy of a trained model against universal and per-image perturbations, and audit it before and after.

    It is trained with :class:`gambeson.defenses.Gambeson`, whose perturbations grow from zero to eps. Some epochs are
    attacked on validation images; of those that keep the accuracy on clean ones, the epoch with the highest mean of
    the accuracies under one universal perturbation and under PGD is selected. Reported numbers are on test images.

    Args:
        model: from pixels (N, C, H, W) in [0, 1] to logits, on the device of the training; it stays as it is.
        data: a ``Dataset``, or a split or (images, labels) pair, which are split by a fixed rule.
        out: folder for both audits, the training, ``model.safetensors``, ``result.json`` and ``report.html``; an
            interrupted hardening resumes there.
        title: of the report.
        settings: fields of :class:`Hardening`, such as ``minutes=10`` and ``keep_accuracy=0.5``.

    Raises:
        UserError: the model cannot be trained or has learnt nothing, the time is too short, the training collapsed
            before any epoch was good, no epoch kept the accuracy and withstood more than the model as it came, or the
            folder holds anything but this hardening.
    """
    began = now()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else as_text(out))
        refuse_foreign(folder, "harden", SCHEDULE)
        job = Job(model, as_dataset(data), Hardening(**settings), began)
        return hardened(job, job.schedule(folder), folder, title)


def hardened(job: Job, schedule: Schedule, folder: Path, title: str) -> Hardened:
    """Execute a job; see :func:`harden`."""

    def keep(**update: Any) -> Schedule:
        held = schedule.model_copy(update=update)
        write_json(folder / SCHEDULE, held.plain())
        return held

    schedule = keep()
    schedule = keep(original=schedule.original or job.attacked())
    net, history, notes = job.train(schedule, folder)  # first, so that no audit is lost if no epoch is good
    schedule = keep(ended=notes)
    before = job.audit(job.model, schedule.suite, folder, BEFORE)
    after = job.audit(net, Suite(**before.results.settings), folder, AFTER)
    found = Hardened(
        model=net,
        before=before,
        after=after,
        comparison=compare(before, after),
        history=history,
        epoch=1 + max(range(len(history)), key=lambda k: job.rank(history[k])),
        keep_accuracy=job.settings.keep_accuracy,
        original=schedule.original,
        notes=tuple(notes),
    )
    if isinstance(net, PixelModel):
        save_model(net, folder / FILE_NAME, {"hardened": found.summary, CLASS_NAMES: job.data.classes})
    else:
        save_tensors(folder / FILE_NAME, net.state_dict(), {"hardened": found.summary})
    report.write(
        [folder / BEFORE, folder / AFTER],
        folder / PAGE,
        title=title or "Before and after hardening",
        answer=" ".join([found.summary, found.choice, *found.notes]),
    )
    write_json(folder / RESULT, {**found.plain(), "environment": environment(job.device)})
    return found


class Job:
    """One hardening.

    Args:
        model: as it came.
        data: with all splits.
        settings: of the hardening.
        began: the beginning of its time, by :func:`gambeson.auditing.clock.now`; None: now.

    Raises:
        UserError: what can be refused before any work.
    """

    def __init__(self, model: nn.Module, data: Dataset, settings: Hardening, began: float | None = None) -> None:
        self.began = now() if began is None else began
        if isinstance(model, BlackBox):
            raise black_box(model.title)
        require_module(model)
        data.test.task.require_classification("hardening")
        self.model, self.data, self.settings = model, data, settings
        eps = default_eps(data.train.shape, settings.norm) if settings.eps is None else settings.eps
        self.defense = Gambeson(**{"eps": eps, "norm": settings.norm, **settings.defense})
        if not self.defense.eps:
            raise UserError("eps is 0: there is nothing to harden against, give a larger one")
        fields = {**self.defense.recipe, "lr": LR, **settings.recipe}
        self._fields = fitted(fields, len(data.train))
        self.most = Recipe(**self._fields).epochs
        self.cost = plan(model, data, self.defense, self._recipe(self.most, 1), settings.seed)
        self.device = self.cost.device
        found = validate(model, data)
        if how := chance_level(found, data.validation):
            raise UserError(f"the model has not learnt: {how}; train it before it is hardened, or check the data")
        if 0 < settings.keep_accuracy < (one := 100 / len(data.validation)):
            warnings.warn(
                f"one of {len(data.validation)} validation images is {one:.1f} points of accuracy, so that "
                f"keep_accuracy = {settings.keep_accuracy:g} allows no loss: give {math.ceil(10 * one) / 10:g} or "
                "more, or more validation images",
                DataWarning,
                stacklevel=3,
            )
        self.base = found[ACCURACY]
        """Accuracy on clean validation images of the model as it came."""

    def rank(self, entry: dict[str, float]) -> float:
        """The number by which an epoch is chosen; that of one that may not be chosen is below all."""
        value = rank(entry, "best-robust") if entry[ACCURACY] >= self._least else None
        return -1.0 if value is None else value

    @property
    def _least(self) -> float:
        """Of the accuracy; more than 0, so that the first epoch that may be chosen is attacked."""
        return max(1e-9, self.base - self.settings.keep_accuracy / 100 - 1e-9)

    def _recipe(self, epochs: int, every: int, least: float = 0.0) -> Recipe:
        select = {"select": "best-robust", "robust_every": every, "least_accuracy": least}
        rise = min(Recipe(**self._fields).warmup, epochs / 2)
        return Recipe(**{**self._fields, "epochs": epochs, "warmup": rise, **select})

    def schedule(self, folder: Path | None = None) -> Schedule:
        """Return how long to train and which suite to audit with, as decided before in this folder, or now.

        Raises:
            UserError: the time is too short, or the folder holds another hardening.
        """
        settings = {"model": fingerprint(self.model), "data": self.data.signs, **self.settings.plain()}
        if folder is not None and (folder / SCHEDULE).is_file():
            found = Schedule(**read_json(folder / SCHEDULE))
            refuse_other(folder, found.settings, settings)
            self.base = found.base  # on another machine it may be another image more or less
            return found
        room = _SLACK * TRAINING * self._left()
        fitting = [n for n in range(1, self.most + 1) if self.seconds(n) <= room]
        if not fitting:
            loading, needed = now() - self.began, self.seconds(1)
            least = (needed / TRAINING / _SLACK + loading) / 60
            step = 10.0 ** (math.floor(math.log10(least)) - 1)
            raise UserError(
                f"{minutes_of(self.settings.minutes or 0)} is too short: loading took {duration(loading)}, and half of "
                f"the rest is for the training, of which one epoch and its validation take about {duration(needed)} on "
                f"this machine; give --minutes {math.ceil(least / step) * step:.3g} or more"
            )
        epochs = fitting[-1]
        return Schedule(
            epochs=epochs, robust_every=_every(epochs), suite=self._suite(), base=self.base, settings=settings
        )

    def _left(self) -> float:
        """Seconds of the time that are left."""
        minutes = self.settings.minutes
        return math.inf if minutes is None else max(0.0, 60 * minutes - (now() - self.began))

    def seconds(self, epochs: int) -> float:
        """Return how long so many epochs take, with their validation."""
        batch = self._recipe(1, 1).batch_size
        gradient = self.cost.networks * self.cost.seconds_a_step / self.cost.plain_ratio / batch
        clean = gradient * len(self.data.validation) / 3
        every = _every(epochs)
        looks = 1 + -(-epochs // every) + (every > 1)  # the model as it came, and the first epoch that may be chosen
        steps = len(self.data.train) // batch
        return epochs * (steps * self.cost.seconds_a_step + clean) + looks * (_LOOK * gradient + clean)

    def _suite(self) -> Suite:
        minutes, settings = self.settings.minutes, self.settings
        share = (1 - TRAINING) / 2 * self._left() / 60
        suite = settings.suite or SUITES["quick" if minutes is None else "full"]
        eps, norm = self.defense.eps, self.defense.norm
        curves = [(eps,)] if suite.eps_points == 1 else [(eps / 2, eps, 1.5 * eps), (eps,)]
        for curve in curves:
            time = suite.minutes if minutes is None else min(share, suite.minutes or share)
            update = {"eps": curve, "norm": norm, "minutes": time}
            chosen = Suite(**(dict(suite) | update))
            try:
                if chosen.minutes is not None:
                    Clock(chosen.minutes, self.model, self.data, chosen, seed=settings.seed).choose()
            except UserError:
                continue
            return chosen
        raise UserError(
            f"a quarter of {minutes_of(minutes or 0)} is too short for an audit of this model on this machine: give "
            "more --minutes, or leave them out"
        )

    def plan(self) -> HardenPlan:
        """Return the expected cost."""
        schedule, speed = self.schedule(), None
        suite = schedule.suite
        if suite.minutes is not None:
            clock = Clock(suite.minutes, self.model, self.data, suite, seed=self.settings.seed)
            suite, speed = clock.choose(), clock.rest.speed
        return HardenPlan(
            epochs=schedule.epochs,
            training=self.cost,
            seconds=self.seconds(schedule.epochs),
            audit=plan_of_audit(self.model, self.data, suite, self.settings.seed, speed),
        )

    def audit(self, model: nn.Module, suite: Suite, folder: Path, label: str) -> Audit:
        """Audit a model in its folder, or resume that."""
        defense = {"name": "gambeson", **self.defense.plain()} if label == AFTER else None
        say(f"audit of the {label} model")
        return audit(model, self.data, suite, folder / label, seed=self.settings.seed, label=label, defense=defense)

    def attacked(self) -> dict[str, float]:
        """Attack the model as it came as the epochs are; return what their entries have of validation."""
        say("validation of the original model")
        seed = self.settings.seed
        with seeded(seed, "validation"):
            return validate(self.model, self.data) | validate_robustly(self.model, self.data, self.defense, seed)

    def train(self, schedule: Schedule, folder: Path) -> tuple[nn.Module, History, list[str]]:
        """Train a copy; return it with the history and with what ended the training early, as sentences.

        Raises:
            UserError: no epoch may be chosen, since none kept the accuracy or none withstands more than the original.
        """
        net, minutes, why = copied(self.model), self.settings.minutes, ""
        last, end = now(), now() + TRAINING * self._left()

        def stop(history: History) -> bool:
            nonlocal why, last
            if schedule.ended is not None:
                return True
            why, took, last = collapsed(history, self.base, self.data.validation), now() - last, now()
            if not why and now() + took > end:
                why = f"its part of the {minutes_of(minutes or 0)} was over"
            return bool(why)

        recipe = self._recipe(schedule.epochs, schedule.robust_every, self._least)
        more: dict[str, Any] = {"out": folder / "training", "label": "harden", "stop": stop}
        try:
            history = train(net, self.data, self.defense, recipe=recipe, seed=self.settings.seed, **more)
            nothing = self._no_gain(history, schedule.original)
        except NoEpochError as error:
            history, nothing = error.history, self._none_kept(error.history)
        except UserError as error:
            if not why:
                raise
            raise UserError(f"the training was stopped because {why}, and {error.reason}") from None
        if nothing:
            raise UserError(f"the training was stopped because {why}, and {nothing}" if why else nothing)
        if schedule.ended is not None:
            return net.eval(), history, schedule.ended
        why = why or collapsed(history, self.base, self.data.validation)
        notes = [] if not why else [f"The training ended after {count(len(history), 'epoch')}: {why}."]
        return net.eval(), history, notes

    def _none_kept(self, history: History) -> str:
        """Say that no epoch of a training may be chosen."""
        lost = 100 * (self.base - max(entry[ACCURACY] for entry in history))
        keep, split = self.settings.keep_accuracy, self.data.validation.name
        if lost > 100 * (self.base - self._least):
            return (
                f"no epoch kept the accuracy: the best lost {lost:.1f} points on {split}, and --keep-accuracy allows "
                f"{keep:g}: give --keep-accuracy {math.ceil(10 * lost) / 10:g} or more, a lower --eps or --lr, or more "
                "--minutes"
            )
        return "no epoch that kept the accuracy could be attacked before that: give more --minutes"

    def _no_gain(self, history: History, original: dict[str, float]) -> str:
        """Say that the epoch chosen withstands no more than the original; empty if it does."""
        best = max(history, key=self.rank)
        if self.rank(best) > (self.rank(original) if original else 0.0):
            return ""
        split, keep = self.data.validation.name, self.settings.keep_accuracy
        than = f", and the original {validated(original)}" if original else ""
        return (
            f"no epoch that lost at most {keep:g} points withstands more than the original: the best has "
            f"{validated(best)} on {split}{than}: give more --minutes, a higher --keep-accuracy, or another --eps or "
            "--lr"
        )


def _every(epochs: int) -> int:
    return math.ceil(epochs / LOOKS)


def black_box(title: str) -> UserError:
    """Build the error for a model whose weights are not there."""
    return UserError(
        f"{title} is a black box, whose weights cannot be changed: name the model itself, such as a training run or "
        "ARCHITECTURE@FILE"
    )
