"""Confusion counts of each image, and what is computed from their sum: pixel accuracy, IoU of a class, and mean IoU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch

from gambeson.base import UserError, notebook
from gambeson.tasks.rate import Difference, Rate, resampled

Metric = Literal["accuracy", "mean_iou", "mean_accuracy"]


@dataclass(frozen=True, repr=False)
class Confusion(notebook.ShownAsTable):
    """Diagonal and margins of the confusion matrix of each image: all that accuracy and IoU depend on.

    Metrics of the data set are computed from the sums over all images, not as means over images. Units without a label
    that counts are in none of the counts, so that a prediction there is no false positive either. The classes of a mean
    are those that occur among the labels: a class that is only predicted costs the IoU of the classes whose units it
    takes, but has no IoU itself, so that clean and perturbed images have a mean over the same classes.

    Intervals are by bootstrap over images, see :meth:`Rate.bootstrap`; in a sample, too, classes without a label are
    left out of a mean.
    """

    counts: torch.Tensor
    """(N, 3, K) int64: of each image and class, the units that are right, those with this label, and those predicted as
    this class."""
    classes: tuple[str, ...]
    """Names of the K classes."""

    @cached_property
    def accuracy(self) -> Rate:
        """Share of all units that are right: pixel accuracy."""
        right, truth, _ = self.counts.sum(2).unbind(1)
        return Rate.bootstrap(right, truth)

    @cached_property
    def mean_iou(self) -> Rate:
        """Mean over classes of their intersection over union; at most :attr:`mean_accuracy`."""
        return self._rate("mean_iou")

    @cached_property
    def mean_accuracy(self) -> Rate:
        """Mean over classes of the share of their units that are right."""
        return self._rate("mean_accuracy")

    @cached_property
    def iou(self) -> dict[str, Rate]:
        """Intersection over union of each class that occurs among the labels, by its name.

        ``n`` counts images with the class in their labels or predictions.
        """
        present = self.counts[:, 1].sum(0).nonzero().flatten()
        right, truth, predicted = self.counts[:, :, present].unbind(1)
        rates = Rate.bootstraps(right, truth + predicted - right)
        return {self.classes[k]: rate for k, rate in zip(present.tolist(), rates, strict=True)}

    def drop(self, other: Confusion, metric: Metric = "mean_iou") -> Difference:
        """How much lower a metric is in ``other``, of the same images: clean minus perturbed.

        Raises:
            UserError: the images have other labels, or there is no such metric.
        """
        if metric not in _METRICS:
            raise UserError(f"metric = {metric!r}: expected one of {', '.join(_METRICS)}")
        if self.classes != other.classes or not torch.equal(self.counts[:, 1], other.counts[:, 1]):
            raise UserError("the two count other images, labels or classes: expected those of one split in one order")
        labelled = self.counts[:, 1].any(1)
        first, second = (one.counts[labelled].flatten(1) for one in (self, other))
        return Difference.of(first, second, partial(self.of_sums, metric), len(first))

    def value(self, metric: Metric) -> float:
        """The metric without its interval; 0 without a label that counts."""
        return float(self.of_sums(metric, self.counts.sum(0).flatten()[None].double()))

    def of_sums(self, metric: Metric, sums: torch.Tensor) -> torch.Tensor:
        """Return the metric for each row of counts summed over images, (B, 3 K) float64."""
        return _METRICS[metric](*sums.unflatten(1, (3, len(self.classes))).unbind(1))

    def rates(self) -> dict[str, Rate]:
        """Return every rate by its name."""
        means = {"pixel accuracy": self.accuracy, "mean accuracy": self.mean_accuracy, "mean IoU": self.mean_iou}
        return means | {f"IoU of {name}": rate for name, rate in self.iou.items()}

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per rate.

        Raises:
            UserError: pandas is not installed.
        """
        return notebook.frame([{"metric": name, **rate.plain()} for name, rate in self.rates().items()])

    def plot(self) -> Any:
        """Return a ``plotly`` figure with the IoU of each class and its interval."""
        lines = {"IoU": (list(self.iou), list(self.iou.values()))}
        return notebook.curves(lines, f"Mean IoU {self.mean_iou}", "class", "IoU (%)").update_traces(mode="markers")

    def _lines(self) -> tuple[str, dict[str, str]]:
        return f"{len(self.counts):,} images", {name: str(rate) for name, rate in self.rates().items()}

    def _rate(self, metric: Metric) -> Rate:
        units = self.counts[:, 1].sum(1)
        rows = self.counts[units > 0].flatten(1)
        if len(rows) == 0:
            return Rate.of(0, 0)
        draws = torch.cat([self.of_sums(metric, sums) for sums in resampled(rows, 0)])
        return Rate.from_error(self.value(metric), draws, len(rows), int(units.sum()))


def _accuracy(right: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    return right.sum(1) / truth.sum(1).clamp(min=1)


def _mean_accuracy(right: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    return (right / truth.clamp(min=1)).sum(1) / (truth > 0).sum(1).clamp(min=1)


def mean_iou(right: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return the mean IoU (B,) of summed counts (B, K) each, over the classes that occur among the labels."""
    # Without a label a class has nothing right, and adds nothing to the sum.
    return (right / (truth + predicted - right).clamp(min=1)).sum(1) / (truth > 0).sum(1).clamp(min=1)


_METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "accuracy": _accuracy,
    "mean_iou": mean_iou,
    "mean_accuracy": _mean_accuracy,
}
