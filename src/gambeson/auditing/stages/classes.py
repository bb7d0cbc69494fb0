"""The classes stage: the error of each class under the perturbation of the middle eps, and class-wise perturbations."""

from __future__ import annotations

from pathlib import Path

import torch

from gambeson.auditing.context import AuditContext
from gambeson.base import save_tensors
from gambeson.evaluation.classes import ClassView, class_view

FILE = "class-wise.safetensors"
"""Holds ``deltas`` (M, C, H, W) and the indices of their ``classes`` (M,)."""


def measure(context: AuditContext, folder: Path | None) -> ClassView | None:
    """Count errors by class, and craft class-wise perturbations if the suite asks for them; None of label maps.

    Class-wise perturbations are crafted on train, selected on validation and reported on test.
    """
    if not context.test.task.per_image_label:
        return None
    before, deltas, file = context.spent, dict[int, torch.Tensor](), ""
    if context.suite.class_wise:
        made = context.suite.class_wise_attack(context.eps).craft_classes(
            context.victim, context.data, seed=context.seed
        )
        deltas = {k: one.delta for k, one in made.items()}
        if folder is not None and deltas:
            file = FILE
            tensors = {"deltas": torch.cat(list(deltas.values())), "classes": torch.tensor(list(deltas))}
            save_tensors(folder / FILE, tensors, {"eps": context.eps, "norm": context.suite.norm})
    found = class_view(
        context.victim,
        context.test,
        context.uaps[context.eps],
        context.test.counts(context.predictions),
        context.counts[context.eps],
        deltas,
        seed=context.seed,
    )
    return found.model_copy(update={"file": file, "cost": context.since(before)})
