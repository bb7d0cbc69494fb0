"""The audit: runs all stages and diagnostics, and stores results, perturbations and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.cost import omitted
from gambeson.auditing.diagnostics import DIAGNOSTICS, Diagnostic, get
from gambeson.auditing.jacobian_results import JacobianResult
from gambeson.auditing.results import (
    AdaptiveResult,
    AuditResult,
    Check,
    Corruption,
    DataInfo,
    IoU,
    ModelInfo,
    PerImageResult,
    RandomnessResult,
    TransferredResult,
    UniversalResult,
    Verdict,
)
from gambeson.auditing.stages import (
    adaptive,
    corruption,
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
from gambeson.auditing.suite import SUITES, Suite
from gambeson.auditing.verdict import judge
from gambeson.base import UserError, environment, pixel_bytes, save_tensors, say, seeded, task, unknown_name
from gambeson.data import Dataset, Split, as_dataset, disjoint
from gambeson.evaluation import BlackBox
from gambeson.evaluation.rates import EpsAdv, EpsUni, ImageErrors
from gambeson.evaluation.targeted import Goal
from gambeson.evaluation.universal import accuracy_rate
from gambeson.models import count_parameters, fingerprint
from gambeson.victim import Victim, nothing_counts, predict, score, vote
from gambeson.victim.temperature import temperature

FILE = "examples.safetensors"
_MAPS_SHOWN = 6


def save_examples(
    folder: Path,
    victim: Victim,
    test: Split,
    uap: UniversalPerturbation,
    before: torch.Tensor,
    after: torch.Tensor,
    count: int = 10,
    curve: Sequence[UniversalPerturbation] = (),
    targeted: Mapping[str, UniversalPerturbation] | None = None,
) -> None:
    """Write ``count`` test images, clean and perturbed, in which right and wrong stand in their true proportion.

    The file holds ``images`` and ``perturbed`` (uint8, K x C x H x W), ``labels``, ``predictions`` and
    ``perturbed_predictions`` (K, or K x H x W). Of images with label maps there are six at the most, whose errors
    under the perturbation are spread evenly over those of all, and the file holds them under every perturbation of the
    curve as well: ``curve`` (E x K x C x H x W) and ``curve_predictions`` (E x K x H x W), by eps. A label that does
    not count is -1 there. For each kind of target, ``KIND`` and ``KIND_predictions`` (K x H x W) and ``KIND_images``
    (K x C x H x W) are added.

    Args:
        folder: of the file.
        victim: the model, inside its context.
        test: the split that is reported on.
        uap: the perturbation.
        before: (N,), what share of each image is wrong when clean.
        after: (N,), what share of it is wrong under the perturbation.
        count: number of images.
        curve: of label maps, the perturbations by eps.
        targeted: of label maps, perturbations with a target, by its kind.
    """
    if test.task.per_image_label:
        chosen = in_proportion(test.labels.cpu(), 2 * (before > 0).long() + (after <= 0).long(), count)
    else:
        parts = min(count, _MAPS_SHOWN, len(test))
        middles = (torch.arange(parts) + 0.5) * len(test) / parts
        chosen = after.argsort(stable=True)[middles.long()]
    images, truths = test.take(chosen, victim.device)
    moved = uap.apply(images)
    with seeded(0, "examples"):  # for the votes of a random model
        clean, perturbed = vote(victim, images), vote(victim, moved)
    tensors = {
        "images": pixel_bytes(images),
        "perturbed": pixel_bytes(moved),
        "labels": truths,
        "predictions": clean,
        "perturbed_predictions": perturbed,
    }
    if not test.task.per_image_label:
        tensors["labels"] = truths.where(test.task.valid(truths), -1)
        everywhere = [one.apply(images) for one in curve]
        with seeded(0, "examples"):
            tensors["curve_predictions"] = torch.stack([vote(victim, under) for under in everywhere])
        tensors["curve"] = torch.stack([pixel_bytes(under) for under in everywhere])
        for kind, one in (targeted or {}).items():
            under = one.apply(images)
            tensors[f"{kind}_images"] = pixel_bytes(under)
            with seeded(0, "examples"):
                tensors[f"{kind}_predictions"] = vote(victim, under)
                if one.target is not None:
                    tensors[kind] = Goal.of(victim, test.subset(chosen), one.target).targets
    save_tensors(folder / FILE, tensors, {"eps": uap.about.eps, "norm": uap.about.norm})


def in_proportion(labels: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to ``count`` indices, from each group its share (largest remainders), group after group.

    Inside a group the first images of every class come in turn, so that nothing else about an image has a say.

    Args:
        labels: (N,), classes.
        groups: (N,), the group of each image, counted from 0.
        count: number of indices.
    """
    sizes, count = groups.bincount(), min(count, len(labels))
    quota = sizes.double() * count / len(labels)
    shares = quota.long()
    shares[(quota - shares).argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    ordered = labels.argsort(stable=True)
    turn = torch.empty_like(ordered)
    turn[ordered] = torch.arange(len(labels)) - (labels.bincount().cumsum(0) - labels.bincount())[labels[ordered]]
    order = (turn * (int(labels.max()) + 1) + labels).argsort()
    return torch.cat([order[groups[order] == group][:share] for group, share in enumerate(shares.tolist())])


@dataclass(frozen=True, repr=False)
class Audit:
    """Result of :func:`audit`."""

    results: AuditResult
    """Every number, with its interval, settings and cost."""
    perturbations: list[UniversalPerturbation]
    """The crafted perturbations, in order of eps."""

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
    suite: str | Suite = "standard",
    out: str | Path | None = None,
    *,
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
        suite: ``quick``, ``standard``, ``full``, or a :class:`Suite`.
        out: folder for ``result.json``, the perturbations and ``examples.safetensors``; an interrupted audit resumes
            there after its last finished stage.
        attacks: your own, run in addition to the suite's: objects such as ``PGD(eps=0.1)``, of any class with
            ``__call__(model, x, y, *, seed, task)`` or of a :class:`UniversalAttack`, or functions. The verdict counts
            those at the middle eps.
        seed: of every draw.
        label: name of the model in tables.
        defense: the settings of its training, if known.
        epochs: of its training, if known.

    Raises:
        UserError: unknown suite, something that is no attack, or a model and data that do not fit each other.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise unknown_name("suite", suite, SUITES)
        suite = SUITES[suite]
    dataset = as_dataset(data)
    keep_eps, suite = bool(suite.eps), suite.on(dataset)
    diagnostics, mine = diagnostics_of(suite), own.of(suite, attacks)
    surrogate.check(suite, dataset, model)
    folder = None if out is None else Path(out)
    black_box = isinstance(model, BlackBox)
    if black_box and mine:
        raise UserError("attacks of your own are for models with gradients, and this is a black box: leave them out")
    stages, notes, asked = Checkpoints(folder, seed), list[str](), suite
    if suite.budget is not None and not black_box:
        raise UserError("a budget limits the queries to a black box, and this model is none: leave suite.budget out")
    with Victim(model, fast=not black_box) as victim:
        victim.allow_no_graph = True  # "no vanishing gradients" reports it
        if isinstance(model, BlackBox):
            suite, dataset, notes = boxes.inspect(victim, model, suite, dataset, stages, folder, keep_eps=keep_eps)
            for note in notes:  # what a budget leaves out is said before it is spent
                say(f"note: {note}")
        reported, twice = _reported(dataset, suite, seed, victim.device)
        look = victim.inspect(reported.test.take(slice(0, 8), victim.device)[0], scores=black_box)
        for part in (reported.train, reported.validation, reported.test):
            part.check_logits(look.shape)
        victim.votes = suite.votes if look.stochastic else 1
        victim.temperature = 1.0 if black_box else temperature(victim, reported.validation, seed)
        if black_box:  # queries spent are recorded
            predictions = torch.tensor(stages.do("clean", list[int], lambda: predict(victim, reported.test).tolist()))
        else:
            predictions = predict(victim, reported.test)
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
                random=look.stochastic,
                defense=defense,
                epochs=epochs,
            ),
            clean=accuracy_rate(score(predictions, reported.test)),
            predictions=predictions,
        )
        return _Auditor(context, folder, stages, [*notes, *twice], diagnostics, mine, omitted(asked, suite)).run()


def diagnostics_of(suite: Suite) -> list[Diagnostic]:
    """Return the built-in diagnostics and those named by the suite."""
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


class _Auditor:
    """Runs the stages, storing each in the folder when it is finished."""

    def __init__(
        self,
        context: AuditContext,
        folder: Path | None,
        stages: Checkpoints,
        notes: list[str],
        diagnostics: list[Diagnostic],
        mine: dict[str, own.Own],
        left_out: list[str],
    ) -> None:
        self.context, self.folder, self.stages, self.notes = context, folder, stages, notes
        self.diagnostics, self.mine, self.omitted = diagnostics, mine, left_out

    def run(self) -> Audit:
        context, stages, do, folder = self.context, self.stages, self.stages.afford, self.folder
        parts = len(context.suite.eps) + 7 + len(self.mine) + len(self.diagnostics)
        with task(f"audit {context.subject.label}", parts) as advance:
            model = context.victim.model
            context.surrogate, source = surrogate.obtain(
                context.suite, context.data, model, folder, stages, context.seed
            )
            advance()
            context.randomness = do("randomness", RandomnessResult | None, lambda: randomness.measure(context), None)
            advance()
            for eps in context.suite.eps:
                craft = partial(universal.craft_point, context, eps, self.folder)
                point = do(universal.file_of(eps), UniversalResult | None, craft, None)
                if point is None:
                    break
                self._recall(eps)
                context.universal.append(point)
                advance()
            universal.end_curve(context)
            again = partial(universal.rescore, context, folder)
            context.universal = do("re-scoring", list[UniversalResult], again, context.universal)
            found = do("eps-uni", EpsUni | None, lambda: universal.search_eps_uni(context), None)
            found = found or universal.search_eps_uni(context, runs=0)
            each = do("eps-adv", EpsAdv | None, lambda: universal.search_eps_adv(context), None)
            advance()
            context.per_image = do("per-image", list[PerImageResult], lambda: per_image.measure(context, folder), [])
            per_image.recall(context, folder)
            advance()
            aimed = targeted.measure(context, stages, self.folder)
            context.transfer = do("transfer", list[TransferredResult], lambda: transfer.measure(context), [])
            advance()
            for name, run in self.mine.items():
                added = stages.do(name, PerImageResult | TransferredResult, partial(run, context))
                if isinstance(added, PerImageResult):
                    context.per_image.append(added)
                else:
                    context.transfer.append(added)
                advance()
            adaptive.record(context, do("adaptive", AdaptiveResult | None, lambda: adaptive.measure(context), None))
            noise = do("corruption", list[Corruption], lambda: corruption.measure(context), list[Corruption]())
            advance()
            jacobians = stages.do("jacobian", JacobianResult | None, self._jacobian)
            advance()
            checks = []
            for diagnostic in self.diagnostics:
                blank = Check(name=diagnostic.name, passed=None, detail="the budget was spent")
                checks.append(do(f"check {diagnostic.name}", Check, partial(diagnostic.check, context), blank))
                advance()
        if folder is not None:
            uap = context.uaps[context.eps]
            clean = ImageErrors.of(context.predictions, context.test)
            before, after = (one.wrong / one.answers.clamp(min=1) for one in (clean, context.errors[context.eps]))
            shown = partial(save_examples, folder, context.victim, context.test, uap, before, after)
            curve = [context.uaps[eps] for eps in context.suite.eps]
            do("examples", None, lambda: shown(curve=curve, targeted=context.targeted), None)
        without = [source.left_out, per_image.left_out(context)]
        if context.suite.jacobian_backwards and not context.subject.black_box and not context.test.task.per_image_label:
            without.append(jacobian.left_out(context.test))
        costs: list[Any] = [*context.universal, *context.per_image, *aimed, *context.transfer]
        costs += [part for part in (each, jacobians) if part is not None]
        result = AuditResult(
            subject=context.subject,
            material=DataInfo.of(context.data),
            seed=context.seed,
            settings=context.suite.plain(),
            clean=context.clean,
            iou=(iou := IoU.of(context.predictions, context.test)),
            temperature=context.victim.temperature or 1.0,
            per_image=context.per_image,
            universal=context.universal,
            eps_uni=found,
            eps_adv=each,
            targeted=aimed,
            transfer=context.transfer,
            surrogate=source,
            corruption=noise,
            randomness=context.randomness,
            jacobian=jacobians,
            checks=checks,
            notes=[
                *self.notes,
                *(f"{name} was left out: {why}." for name, why in stages.left_out.items()),
                *boxes.remarks(model),
                *filter(None, without),
            ],
            verdict=judge(
                context.clean,
                context.universal,
                found,
                checks,
                per_image=context.per_image,
                transfer=context.transfer,
                subject=context.subject,
                randomness=context.randomness,
                each=each,
                left_out=boxes.left_out([*self.omitted, *stages.left_out], context.suite.budget),
                targeted=aimed,
                unit=context.test.task.unit,
                iou=iou,
            ),
            cost=sum((part.cost for part in costs), found.cost),
            environment=environment(context.victim.device),
        )
        if self.folder is not None:
            result.save(self.folder)
        if isinstance(model, BlackBox):
            model.settle()
        return Audit(result, [context.uaps[eps] for eps in context.suite.eps])

    def _jacobian(self) -> JacobianResult | None:
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
