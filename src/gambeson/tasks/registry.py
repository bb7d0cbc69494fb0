"""Tasks by name: what labels mean, and when an answer to them is right."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from gambeson.base import Registry, UserError
from gambeson.tasks.base import Task


def _fault(target: Any) -> str | None:
    if inspect.isclass(target) and issubclass(target, Task):
        return None
    return "expected a subclass of gambeson.tasks.Task"


TASKS: Registry[type[Task]] = Registry("task", "gambeson.tasks", room="gambeson.tasks", check=_fault)
"""Every task: of this library, of installed packages (group ``gambeson.tasks``), and of this process."""

register = TASKS.register
"""``@register("name")`` at a task's class gives it its name."""


def names() -> list[str]:
    """Every name that :func:`create` takes, in alphabetical order."""
    return TASKS.names()


def create(name: str, **settings: Any) -> Task:
    """Build a task by name, for example ``create("segmentation", ignore_index=255)``.

    Args:
        name: a registered name, or ``FILE.py:CLASS``.
        **settings: of the task.

    Raises:
        UserError: no such task, or a setting that is unknown or out of range.
    """
    return TASKS.get(name).target(**settings)


def of(labels: torch.Tensor, ignore_index: int | None = None) -> Task:
    """Return the task that labels of this form belong to: (N,) classification, (N, H, W) segmentation.

    A task of a package or of your own is never guessed: give it to the split (``Split(..., task=...)``).

    Args:
        labels: of a batch, or of a whole data set.
        ignore_index: the label that counts nowhere, or None.

    Raises:
        UserError: no task has labels of this form.
    """
    for entry in TASKS.own():
        if labels.ndim == entry.target.label_dims:
            return entry.target(ignore_index=ignore_index)
    raise UserError(
        f"labels have shape {tuple(labels.shape)}: expected (N,), one label per image, or (N, H, W), one per pixel"
    )
