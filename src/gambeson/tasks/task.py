"""What a task is, the two of this library, and every task by name."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from gambeson.base import Config, Registry, UserError
from gambeson.tasks.rate import Rate

_NEVER = -100
"""What torch is told to ignore where a task ignores nothing: a label that never occurs."""
IGNORED = (255, -1, -100)
"""Labels commonly used for unlabelled pixels: VOC and Cityscapes masks, exporters, torch's default."""


def answers(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of the largest logit of each unit, the first of equal ones: (N,) of (N, K), else (N, H, W).

    On a processor ``argmax`` takes four times as long along the classes of maps, a third of a small net's forward.
    """
    return logits.argmax(1) if logits.ndim == 2 else logits.max(1).indices


@dataclass(frozen=True)
class Counts:
    """Right answers of each image: the sufficient statistics of accuracy and of its interval."""

    right: torch.Tensor
    """(N,): units that are answered rightly."""
    total: torch.Tensor
    """(N,): units with a label that counts. For one label per image 1, or 0 where that is the ignore index."""

    @property
    def images(self) -> int:
        """Images with at least one unit that counts: the independent trials of an interval."""
        return int((self.total > 0).sum())

    @property
    def wrong(self) -> torch.Tensor:
        """(N,): units that count and are not answered rightly."""
        return self.total - self.right

    @property
    def errors(self) -> int:
        """Units that count and are not answered rightly, of all images."""
        return int(self.wrong.sum())

    @property
    def error(self) -> float:
        """The share of wrong units, 0 where nothing counts; :attr:`error_rate` without its interval."""
        return self.errors / max(1, int(self.total.sum()))

    @cached_property
    def accuracy(self) -> Rate:
        """The share of right units, with its 95 % interval over images (:meth:`Rate.bootstrap`).

        Of label maps this is the pixel accuracy.
        """
        return Rate.bootstrap(self.right, self.total)

    @cached_property
    def error_rate(self) -> Rate:
        """The share of wrong units; see :attr:`accuracy`."""
        return Rate.bootstrap(self.wrong, self.total)

    @property
    def rows(self) -> torch.Tensor:
        """(N, 2) int64: wrong units, and those that count."""
        return torch.stack([self.wrong, self.total], 1)

    @staticmethod
    def of_sums(sums: torch.Tensor) -> torch.Tensor:
        """Return the share of wrong units (B,) for each row of sums of :attr:`rows`, (B, 2)."""
        return sums[:, 0] / sums[:, 1].clamp(min=1)

    @property
    def shares(self) -> torch.Tensor:
        """(M,) float64: the share of right units of each image that has any that count."""
        counted = self.total > 0
        return self.right[counted].double() / self.total[counted]


class Task(Config):
    """What the labels of a data set mean: which units count, when an answer is right, and what success is.

    A *unit* is what has one label and gets one answer: an image in classification, a pixel in segmentation. The other
    rooms ask the task, and never how many dimensions labels have or whether a label is the ignore index.

    A task of your own is a subclass with ``@register("name")``. It sets :attr:`label_dims` and :attr:`label_form`, says
    what the units of an image are (:meth:`units`), and may replace :meth:`matches`, :meth:`cross_entropy` or anything
    else here.
    """

    label_dims: ClassVar[int]
    """Dimensions of the labels of a batch."""
    label_form: ClassVar[str]
    """The form of the labels in words, for messages."""
    unit: ClassVar[str] = "unit"
    """What a unit is, as a noun."""
    per_image_label: ClassVar[bool] = False
    """Whether an image has one label and one answer, so that it is the image that is right or wrong."""

    ignore_index: int | None = None
    """The label of units that count nowhere; None where all count."""

    @property
    def all_count(self) -> bool:
        """Whether every label counts, since there is no ignore index."""
        return self.ignore_index is None

    @property
    def labels_every_image(self) -> bool:
        """Whether every image has one label, and that label counts."""
        return self.per_image_label and self.all_count

    @abstractmethod
    def units(self, values: torch.Tensor) -> torch.Tensor:
        """Return values that have the form of labels as (N, U): one row per image, one column per unit."""

    def matches(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return which predictions agree with their label, in the shape of ``labels``; any label counts here."""
        return predictions == labels

    def valid(self, labels: torch.Tensor) -> torch.Tensor:
        """Return which units count, in the shape of ``labels``: those whose label is not the ignore index."""
        if self.ignore_index is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.ignore_index

    def labelled(self, labels: torch.Tensor) -> torch.Tensor:
        """Return which images have a unit that counts, (N,)."""
        return self.units(self.valid(labels)).any(1)

    def indexable(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels with class 0 in place of the ignore index, so that logits can be gathered by them."""
        return labels if self.ignore_index is None else labels.where(self.valid(labels), 0)

    def targets(self, chosen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what was chosen to leave or to reach where the label counts, and the ignore index elsewhere."""
        return chosen if self.ignore_index is None else chosen.where(self.valid(labels), labels)

    def check_labels(self, labels: torch.Tensor, classes: int) -> None:
        """Refuse labels that are not integers in [0, classes), the ignore index apart.

        Raises:
            UserError: such labels.
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise UserError(f"labels are {labels.dtype}: expected integers from 0 to {classes - 1}")
        counting = labels if self.ignore_index is None else labels[self.valid(labels)]
        if counting.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(counting))
        if low < 0 or high >= classes:
            mark = next((mark for mark in IGNORED if mark in (low, high)), None) if self.all_count else None
            hint = "renumber them from 0, or choose a model and class names of these labels"
            if low == 1 and high == classes:
                hint = "do they start at 1? Then pass labels - 1"
            elif mark is not None:
                hint = (
                    f"if {mark} marks what has no label, give task=gb.tasks.{type(self).__name__}(ignore_index={mark})"
                )
                hint += f"; if it marks a foreground, pass labels == {mark}"
            raise UserError(
                f"labels reach from {low} to {high}, but there are {classes} classes: expected 0 to {classes - 1}; "
                f"{hint}"
            )

    def check_logits(self, shape: Sequence[int], labels: torch.Tensor) -> None:
        """Refuse logits without a row of scores for every unit, or without a score for every label.

        Args:
            shape: of the logits, (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W).

        Raises:
            UserError: such logits.
        """
        if tuple(shape[2:]) != tuple(labels.shape[1:]):
            hint = "take labels and a model of one task"
            if len(shape) == labels.ndim + 1:
                hint = "let the model end with F.interpolate(logits, images.shape[-2:], mode='bilinear')"
            elif tuple(shape[2:]) == (1, 1):
                hint = "let the model end with logits.flatten(1)"
            raise UserError(
                f"the model answers with shape {tuple(shape[1:])} per image, but the labels have shape "
                f"{tuple(labels.shape)}: expected logits (N, K) for labels (N,), or (N, K, H, W) for labels "
                f"(N, H, W); {hint}"
            )
        self.check_labels(labels, shape[1])

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Return the cross-entropy of every unit, in the shape of ``labels``; zero where the label does not count.

        Args:
            logits: (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W).
            label_smoothing: share of the target spread over all classes.
        """
        ignored = _NEVER if self.ignore_index is None else self.ignore_index
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=ignored, label_smoothing=label_smoothing)

    def per_image(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean of each image's values over its units that count, (N,); zero where none does.

        Args:
            values: one per unit, in the shape of ``labels``.
            labels: (N,) or (N, H, W).
        """
        valid = self.valid(labels)
        if self.ignore_index is not None:
            values = values.where(valid, 0)
        return self.units(values).sum(1) / self.units(valid).sum(1).clamp(min=1)

    def counts(self, predictions: torch.Tensor, labels: torch.Tensor) -> Counts:
        """Count, for each image, the units that are answered rightly and those that count.

        Args:
            predictions: class indices in the shape of ``labels``, on the same device.
            labels: (N,) or (N, H, W).

        Raises:
            UserError: the shapes differ.
        """
        _same_form(predictions, labels)
        valid = self.valid(labels)
        right = self.matches(predictions, labels) & valid
        return Counts(self.units(right).sum(1), self.units(valid).sum(1))

    def confusion(self, predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """Count, for each image and class, the units that are right, those with this label, and those predicted so.

        Args:
            predictions: class indices in the shape of ``labels``, on the same device; one outside ``classes``, such as
                that of a vote without a majority, is wrong and predicts no class.
            labels: (N,) or (N, H, W).
            classes: number of classes, K.

        Returns:
            (N, 3, K) int64: see :class:`gambeson.tasks.Confusion`.

        Raises:
            UserError: the shapes differ, or a label is beyond the classes.
        """
        self.check_labels(labels, classes)
        _same_form(predictions, labels)
        valid = self.valid(labels)
        known = valid & (predictions >= 0) & (predictions < classes)
        right = self.matches(predictions, labels) & valid
        found = []
        for values, kept in ((labels, right), (labels, valid), (predictions, known)):
            kept = self.units(kept)
            places = self.units(values) + torch.arange(len(labels), device=labels.device)[:, None] * classes
            found.append(torch.bincount(places[kept], minlength=len(labels) * classes).view(len(labels), classes))
        return torch.stack(found, 1)

    def succeeded(self, logits: torch.Tensor, labels: torch.Tensor, *, targeted: bool = False) -> torch.Tensor:
        """Return the units that count on which an attack has succeeded, in the shape of ``labels``.

        Args:
            logits: (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W); targets where ``targeted``.
            targeted: whether the labels are targets to reach.
        """
        hit = self.matches(answers(logits), labels)
        hit = hit if targeted else ~hit
        return hit if self.ignore_index is None else hit & self.valid(labels)

    def is_adversarial(self, logits: torch.Tensor, labels: torch.Tensor, *, targeted: bool = False) -> torch.Tensor:
        """Return whether an attack has succeeded on each image, (N,).

        Every unit that counts must differ from its label (or, where ``targeted``, agree with its target): for one
        label per image that is misclassification. An image without a unit that counts has nothing left to attack, so
        that it counts as a success. Arguments as in :meth:`succeeded`.
        """
        hit = self.succeeded(logits, labels, targeted=targeted)
        return self.units(hit if self.ignore_index is None else hit | ~self.valid(labels)).all(1)

    def _refuse(self, values: torch.Tensor) -> None:
        raise UserError(f"labels or values have shape {tuple(values.shape)}: expected {self.label_form}")

    def require_classification(self, what: str, hint: str = "") -> None:
        """Refuse labels other than one per image.

        Args:
            what: what needs them, as the subject of "expects one label per image".
            hint: what to do about it, as the end of the sentence.

        Raises:
            UserError: an image has not one label.
        """
        if not self.per_image_label:
            raise UserError(
                f"the labels are {self.label_form}: {what} expects one label per image (N,)"
                + (f"; {hint}" if hint else "")
            )


def _same_form(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    if predictions.shape != labels.shape:
        raise UserError(
            f"the model answers with shape {tuple(predictions.shape)}, but the labels have {tuple(labels.shape)}: "
            "expected logits (N, K) for labels (N,), or (N, K, H, W) for labels (N, H, W)"
        )


def _fault(target: Any) -> str | None:
    if not (inspect.isclass(target) and issubclass(target, Task)):
        return "expected a subclass of gambeson.tasks.Task"
    missing = [name for name in ("label_dims", "label_form") if not hasattr(target, name)]
    missing += sorted(target.__abstractmethods__)
    return f"it does not define {' and '.join(missing)}" if missing else None


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


@register("classification")
class Classification(Task):
    """One label per image: logits (N, K), labels (N,); an image is right or wrong."""

    label_dims: ClassVar[int] = 1
    label_form: ClassVar[str] = "one label per image (N,)"
    unit: ClassVar[str] = "image"
    per_image_label: ClassVar[bool] = True

    def units(self, values: torch.Tensor) -> torch.Tensor:
        """Return (N,) as (N, 1): the image is the unit.

        Raises:
            UserError: there is not one value per image.
        """
        if values.ndim != 1:
            self._refuse(values)
        return values.unsqueeze(1)

    def per_image(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the values themselves, (N,), zero where the label does not count."""
        if values.ndim != 1:
            self._refuse(values)
        return values if self.ignore_index is None else values.where(self.valid(labels), 0)


@register("segmentation")
class Segmentation(Task):
    """One label per pixel: logits (N, K, H, W), labels (N, H, W); each labelled pixel is right or wrong.

    Losses are averaged over the labelled pixels of an image, the headline metric is the pixel accuracy, and an attack
    has succeeded on an image once no labelled pixel is right.
    """

    label_dims: ClassVar[int] = 3
    label_form: ClassVar[str] = "label maps (N, H, W)"
    unit: ClassVar[str] = "pixel"

    def units(self, values: torch.Tensor) -> torch.Tensor:
        """Return (N, H, W) as (N, H * W): the pixels are the units.

        Raises:
            UserError: there is not one value per pixel.
        """
        if values.ndim != 3:
            self._refuse(values)
        return values.flatten(1)


CLASSIFICATION = Classification()
"""Classification in which every label counts: what is meant where no task is given."""
