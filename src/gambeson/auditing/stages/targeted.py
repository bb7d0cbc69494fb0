"""The targeted stage: one perturbation that makes label maps show a chosen scene, and one that hides a class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gambeson.attacks import StochasticPGD, Target, UniversalPerturbation
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.results import TargetedResult
from gambeson.data import Dataset
from gambeson.evaluation.targeted import target_success
from gambeson.victim import predict


def targets(context: AuditContext) -> list[Target]:
    """Return the targets that are tried: the truth of a validation image, and the class to hide.

    The image is drawn from the seed. The class is the one that the model predicts most often on validation, the most
    frequent one (the ground) apart; there is none if it predicts a single class, or this one nowhere on test. Both
    choices are ours.
    """
    if context.test.task.per_image_label or context.subject.black_box or not context.suite.targeted:
        return []
    validation = context.data.validation
    predictions = predict(context.victim, validation, seed=context.seed)
    counts = predictions[validation.task.valid(validation.labels.cpu())].clamp(min=0).bincount()
    order = counts.argsort(descending=True, stable=True)
    found = [Target.parse(f"static:{int(validation.sample_indices(1, seed=context.seed)[0])}")]
    shown = context.test.task.valid(context.test.labels.cpu()) & (context.predictions == order[1:2])
    if len(order) > 1 and counts[order[1]] and bool(shown.any()):
        found.append(Target.parse(f"hide:#{int(order[1])}").within(validation))
    return found


def file_of(target: Target) -> str:
    """File name of the perturbation for a target."""
    return f"target-{target.kind}.safetensors"


def measure(context: AuditContext, stages: Checkpoints, folder: Path | None) -> list[TargetedResult]:
    """Craft a perturbation for each target at the middle eps, and measure what of it is reached on test."""
    found = []
    for target in targets(context):
        craft = partial(_craft, context, target, folder)
        result = stages.afford(file_of(target), TargetedResult | None, craft, None)
        if result is None:
            continue
        if target.kind not in context.targeted and folder is not None:
            context.targeted[target.kind] = UniversalPerturbation.load(folder / file_of(target))
        found.append(result)
    return found


def enough(context: AuditContext, attack: StochasticPGD) -> Dataset:
    """Return the data with no more training images than the attack takes: the targets of each cost a forward."""
    data, taken = context.data, attack.steps * attack.batch_size
    if len(data.train) <= taken:
        return data
    return Dataset(data.name, context.few(taken, data.train), data.validation, data.test, data.classes)


def _craft(context: AuditContext, target: Target, folder: Path | None) -> TargetedResult:
    before, suite = context.spent, context.suite
    attack = suite.universal(context.eps, restarts=1).model_copy(update={"target": target, "labels": "prediction"})
    uap = attack.craft(context.victim, enough(context, attack), seed=context.seed)
    context.targeted[target.kind] = uap
    if folder is not None:
        uap.save(folder / file_of(target))
    reached = target_success(context.victim, context.test, uap, seed=context.seed, controls=suite.controls)
    name = context.test.classes[target.index] if target.kind == "hide" else target.value
    return TargetedResult(
        target=f"{target.kind}:{name}",
        eps=context.eps,
        norm=suite.norm,
        reached=reached,
        file=file_of(target),
        cost=context.since(before),
    )
