"""Hardening of a model: fine-tuning with the preset ``gambeson``, the choice of an epoch, an audit before and after."""

from __future__ import annotations

import math
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from gambeson import report
from gambeson.auditing import SUITES, Audit, AuditPlan, Comparison, Suite, audit, compare
from gambeson.auditing.clock import Clock, minutes_of, now
from gambeson.auditing.cost import plan as plan_of_audit
from gambeson.auditing.display import doubt_of
from gambeson.auditing.run import AuditSuite
from gambeson.base import (
    Config,
    Number,
    UserError,
    as_text,
    count,
    duration,
    environment,
    eps_text,
    read_json,
    refuse_foreign,
    refuse_other,
    save_tensors,
    say,
    write_json,
)
from gambeson.base.errors import DataWarning
from gambeson.data import Dataset, Split, as_dataset
from gambeson.defenses import Gambeson
from gambeson.evaluation import BlackBox
from gambeson.models import PixelModel, fingerprint
from gambeson.models import save as save_model
from gambeson.models.storage import CLASS_NAMES, FILE_NAME
from gambeson.threat import Eps, Norm, default_eps
from gambeson.training import Recipe, TrainingCost, plan, train
from gambeson.training.loop import History
from gambeson.training.recipe import fitted
from gambeson.training.validation import ACCURACY, chance_level, rank, validate
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
_ROW, _FALL, _LOST = 3, 0.1, 0.15
"""A collapse: epochs in a row that lose accuracy, how much of it in all, and of that under PGD between two looks."""


class Hardening(Config):
    """Settings of a hardening, of any model on any data."""

    eps: Eps | None = None
    """Radius in pixel units; None: 0.2 for grey images, 8/255 for others."""
    norm: Norm = "inf"
    minutes: Annotated[Number, Field(gt=0)] | None = None
    """For everything: half of them for the training, a quarter for each audit. None: no limit."""
    keep_accuracy: Annotated[Number, Field(ge=0, le=100)] = 1.0
    """Points of clean accuracy that may be lost, measured on validation."""
    suite: AuditSuite | None = None
    """Suite of both audits, at eps / 2, eps and 3/2 eps. None: what of ``full`` fits the time, or else ``quick``."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`gambeson.training.Recipe` in place of those of hardening, such as ``lr`` or ``augment``."""
    defense: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`gambeson.defenses.Gambeson`; ``speed`` is the largest number of epochs, 10 or 40."""
    seed: int = 0


class Schedule(Config):
    """What of a hardening is decided by the time: it is measured once, and kept for a resumed run."""

    epochs: int
    """Passes over the training split, at the most."""
    robust_every: int
    """Epochs from one look of the attacks of validation to the next."""
    suite: Suite
    """Of the audit before; its limit of time is that of one audit."""
    base: float
    """Accuracy of the model as it came, on clean validation images."""
    settings: dict[str, Any]
    """Of the hardening, and the fingerprints of model and data."""


class HardenPlan(Config):
    """The expected cost of a hardening."""

    epochs: int
    """Passes over the training split, at the most."""
    training: TrainingCost
    seconds: float
    """Of the training, with its validation."""
    audit: AuditPlan
    """Of one of the two audits, at the most."""

    @property
    def total(self) -> float:
        """Seconds of training and audits."""
        return self.seconds + 2 * self.audit.seconds


@dataclass(frozen=True, repr=False)
class Hardened:
    """Result of :func:`harden`."""

    model: nn.Module
    """The hardened model, in evaluation mode."""
    before: Audit
    after: Audit
    comparison: Comparison
    """Of the two audits, image by image."""
    history: History
    """One entry per epoch of the training."""
    epoch: int
    """The one that was chosen, counted from 1."""
    keep_accuracy: float
    """Points of clean accuracy that could be lost on validation."""
    notes: tuple[str, ...] = ()
    """What else has to be known. Whole sentences."""

    @property
    def summary(self) -> str:
        """What was gained and lost on the test split, in a few sentences."""
        changes = {change.name: change for change in self.comparison.changes}
        eps = self.before.results.middle.eps
        clean, uer = changes["clean"], changes[f"uer@{eps:.4g}"]
        said = (
            f"One pattern of eps {eps_text(eps)} fools the hardened model on {100 * uer.second.value:.1f} % of test "
            f"images, and the original on {100 * uer.first.value:.1f} %."
        )
        if uer.outcome != "better":
            said += " That is no clear gain." if uer.outcome != "worse" else " That is clearly worse."
        if attacks := [change for name, change in changes.items() if name.startswith("per_image:")]:
            one, other = (100 * min(getattr(change, side).value for change in attacks) for side in ("first", "second"))
            said += f" Attacked image by image, {other:.1f} % stay right, and {one:.1f} % before."
        lost = -100 * clean.difference.value
        said += f" Clean accuracy is {100 * clean.second.value:.1f} %, and {100 * clean.first.value:.1f} % before"
        if lost > self.keep_accuracy + 1e-9:
            said += f": {lost:.1f} points were lost on test, although at most {self.keep_accuracy:g} on validation"
        if doubt := doubt_of(self.after.results):
            said += f". The numbers of the hardened model are {doubt}: it may be weaker than they say"
        return f"{said}."

    def __repr__(self) -> str:
        return self.summary

    def plain(self) -> dict[str, Any]:
        """Everything but the model and the audits, as plain data."""
        return {
            "schema": "gambeson/harden-1",
            "summary": self.summary,
            "epoch": self.epoch,
            "keep_accuracy": self.keep_accuracy,
            "history": self.history,
            "comparison": self.comparison.plain(),
            "trusted": self.after.verdict.trusted,
            "notes": list(self.notes),
        }


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
            before any epoch was good, no epoch kept the accuracy, or the folder holds anything but this hardening.
    """
    began = now()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else as_text(out))
        refuse_foreign(folder, "harden", SCHEDULE)
        job = Job(model, as_dataset(data), Hardening(**settings))
        return hardened(job, job.schedule(folder), folder, title, began)


def hardened(job: Job, schedule: Schedule, folder: Path, title: str, began: float) -> Hardened:
    """Execute a job that began at a time of :func:`gambeson.auditing.clock.now`; see :func:`harden`."""
    write_json(folder / SCHEDULE, schedule.plain())
    net, history, notes = job.train(schedule, folder, began)  # first, so that no audit is lost if no epoch is good
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
        answer=found.summary,
    )
    write_json(folder / RESULT, {**found.plain(), "environment": environment(job.device)})
    return found


def collapsed(history: History, base: float, split: Split) -> str:
    """Return how a training has collapsed, as a sentence without its full stop; empty if it has not.

    Args:
        history: of the training so far.
        base: accuracy on clean validation images at its beginning.
        split: the validation split.
    """
    last = history[-1]
    if how := chance_level(last, split):
        return f"its answers have become constant or random: {how}"
    clean = [base, *(entry[ACCURACY] for entry in history)][-_ROW - 1 :]
    if len(clean) > _ROW and all(b < a for a, b in pairwise(clean)) and base - clean[-1] > _FALL:
        return (
            f"accuracy on clean {split.name} images fell {_ROW} epochs in a row, from {100 * base:.1f} % at the "
            f"beginning to {100 * clean[-1]:.1f} %"
        )
    looks = [entry["validation_pgd_accuracy"] for entry in history if "validation_pgd_accuracy" in entry]
    if looks and max(looks) - looks[-1] > _LOST and looks[-1] < max(looks) / 2:
        return (
            f"accuracy under PGD on {split.name} fell from {100 * max(looks):.1f} % to {100 * looks[-1]:.1f} %, which "
            "the single steps of the training do not see: its gradients are being masked (catastrophic overfitting)"
        )
    return ""


class Job:
    """One hardening.

    Raises:
        UserError: what can be refused before any work.
    """

    def __init__(self, model: nn.Module, data: Dataset, settings: Hardening) -> None:
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
        return max(0.0, self.base - self.settings.keep_accuracy / 100 - 1e-9)

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
            refuse_other(folder, {"data": settings["data"], **found.settings}, settings)  # earlier versions have none
            self.base = found.base  # on another machine it may be another image more or less
            return found
        minutes = self.settings.minutes
        fitting = [n for n in range(1, self.most + 1) if minutes is None or self.seconds(n) <= self._room(minutes)]
        if not fitting:
            least = self.seconds(1) / 60 / TRAINING / _SLACK
            raise UserError(
                f"{minutes_of(minutes or 0)} is too short: half of it is for the training, of which one epoch and "
                f"its validation take about {duration(self.seconds(1))} on this machine; give --minutes {least:.2g} or "
                "more"
            )
        epochs = fitting[-1]
        return Schedule(
            epochs=epochs, robust_every=_every(epochs), suite=self._suite(), base=self.base, settings=settings
        )

    def _room(self, minutes: float) -> float:
        return TRAINING * 60 * minutes * _SLACK

    def seconds(self, epochs: int) -> float:
        """Return how long so many epochs take, with their validation."""
        batch = self._recipe(1, 1).batch_size
        gradient = self.cost.networks * self.cost.seconds_a_step / self.cost.plain_ratio / batch
        clean = gradient * len(self.data.validation) / 3
        looks = -(-epochs // _every(epochs))
        steps = len(self.data.train) // batch
        return epochs * (steps * self.cost.seconds_a_step + clean) + looks * (_LOOK * gradient + clean)

    def _suite(self) -> Suite:
        minutes, settings = self.settings.minutes, self.settings
        share = None if minutes is None else minutes * (1 - TRAINING) / 2
        suite = settings.suite or SUITES["quick" if minutes is None else "full"]
        eps, norm = self.defense.eps, self.defense.norm
        curves = [(eps,)] if suite.eps_points == 1 else [(eps / 2, eps, 1.5 * eps), (eps,)]
        for curve in curves:
            update = {"eps": curve, "norm": norm, "minutes": share if settings.suite is None else suite.minutes}
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

    def train(self, schedule: Schedule, folder: Path, began: float) -> tuple[nn.Module, History, list[str]]:
        """Train a copy; return it with the history and with what ended the training early, as sentences.

        Raises:
            UserError: no epoch may be chosen.
        """
        net, minutes, why = copied(self.model), self.settings.minutes, ""

        def stop(history: History) -> bool:
            nonlocal why
            why = collapsed(history, self.base, self.data.validation)
            if not why and minutes is not None and now() - began > 60 * minutes * TRAINING:
                why = f"its part of the {minutes_of(minutes)} was over"
            return bool(why)

        recipe = self._recipe(schedule.epochs, schedule.robust_every, self._least)
        more: dict[str, Any] = {"out": folder / "training", "label": "harden", "stop": stop}
        try:
            history = train(net, self.data, self.defense, recipe=recipe, seed=self.settings.seed, **more)
        except UserError as error:
            if not why:
                raise
            raise UserError(f"the training was stopped because {why}, and {error.reason}") from None
        why = why or collapsed(history, self.base, self.data.validation)
        notes = [] if not why else [f"The training ended after {count(len(history), 'epoch')}: {why}."]
        return net.eval(), history, notes


def _every(epochs: int) -> int:
    return math.ceil(epochs / LOOKS)


def black_box(title: str) -> UserError:
    """Build the error for a model whose weights are not there."""
    return UserError(
        f"{title} is a black box, whose weights cannot be changed: name the model itself, such as a training run or "
        "ARCHITECTURE@FILE"
    )
