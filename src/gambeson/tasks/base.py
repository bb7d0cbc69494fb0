"""What a task is, and the counts that its rates are made of."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from gambeson.base import Config, UserError
from gambeson.tasks.rate import Rate

_NEVER = -100
"""What torch is told to ignore where a task ignores nothing: a label that never occurs."""


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
    def errors(self) -> int:
        """Units that count and are not answered rightly."""
        return int(self.total.sum()) - int(self.right.sum())

    @property
    def accuracy(self) -> Rate:
        """The share of right units, with its 95 % Wilson interval over images.

        Of label maps this is the pixel accuracy; its interval is over images, which is the cautious choice since the
        pixels of one image are not independent.
        """
        return Rate.of(int(self.right.sum()), int(self.total.sum()), self.images)

    @property
    def shares(self) -> torch.Tensor:
        """(M,) float64: the share of right units of each image that has any that count."""
        counted = self.total > 0
        return self.right[counted].double() / self.total[counted]


class Task(Config):
    """What the labels of a data set mean: which units count, when an answer is right, and what success is.

    A *unit* is what has one label and gets one answer: an image in classification, a pixel in segmentation. The other
    rooms ask the task, and never how many dimensions labels have or whether a label is the ignore index.

    A task of your own is a subclass with ``@register("name")``. It says what the units of an image are
    (:meth:`units`), and may replace :meth:`matches`, :meth:`cross_entropy` or anything else here.
    """

    label_dims: ClassVar[int]
    """Dimensions of the labels of a batch."""
    label_form: ClassVar[str]
    """The form of the labels in words, for messages."""
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
            raise UserError(
                f"labels reach from {low} to {high}, but there are {classes} classes: expected 0 to {classes - 1}"
                + ("; do they start at 1?" if low == 1 and high == classes else "")
            )

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
        if predictions.shape != labels.shape:
            raise UserError(
                f"the model answers with shape {tuple(predictions.shape)}, but the labels have "
                f"{tuple(labels.shape)}: expected logits (N, K) for labels (N,), or (N, K, H, W) for labels (N, H, W)"
            )
        valid = self.valid(labels)
        right = self.matches(predictions, labels) & valid
        return Counts(self.units(right).sum(1), self.units(valid).sum(1))

    def is_adversarial(self, logits: torch.Tensor, labels: torch.Tensor, *, targeted: bool = False) -> torch.Tensor:
        """Return whether an attack has succeeded on each image, (N,).

        Every unit that counts must differ from its label (or, where ``targeted``, agree with its target): for one
        label per image that is misclassification. An image without a unit that counts has nothing left to attack, so
        that it counts as a success.

        Args:
            logits: (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W); targets where ``targeted``.
            targeted: whether the labels are targets to reach.
        """
        hit = self.matches(logits.argmax(1), labels)
        hit = hit if targeted else ~hit
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
