"""Rates of each class, and the area under the ROC curve of two classes, clean and under a universal perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.base import Config, UserError, eps_text, notebook, seeded
from gambeson.data import Split
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.universal import scorable
from gambeson.tasks import Counts, Rate
from gambeson.threat import perturb
from gambeson.victim import Victim, as_victim, auto_batch_size, predict, votes_of


class ClassRates(Config):
    """Errors on the images of one class; the intervals of a column hold for all classes at once."""

    name: str
    clean: Rate
    """Error on clean images."""
    uer: Rate
    """Error under the perturbation of all images."""
    own: Rate | None = None
    """Error under a perturbation that was crafted for this class alone; None where none was."""


class Auc(Config):
    """Area under the ROC curve of two classes, by the difference of their logits; see :func:`area_under_curve`."""

    positive: str
    """The class that a high difference stands for."""
    clean: Rate
    perturbed: Rate


class ClassView(notebook.ShownAsTable, Config):
    """What one perturbation does to each class."""

    attack: str
    eps: float
    norm: str
    classes: list[ClassRates]
    """Those that have test images, in the order of their indices."""
    auc: Auc | None = None
    """Of two classes."""
    file: str = ""
    """File of the perturbations of single classes, relative to the result; empty without."""
    cost: Cost = Field(default_factory=Cost)
    """Of class-wise crafting and of what was scored for this view."""

    @property
    def worst(self) -> ClassRates:
        """The class with the highest error under the perturbation of all images."""
        return max(self.classes, key=lambda one: one.uer.value)

    @property
    def best(self) -> ClassRates:
        """The one with the lowest."""
        return min(self.classes, key=lambda one: one.uer.value)

    def _lines(self) -> tuple[str, dict[str, str]]:
        lines = {
            one.name: f"UER {one.uer}, clean error {one.clean}" + (f", class-wise {one.own}" if one.own else "")
            for one in self.classes
        }
        if self.auc is not None:
            lines["AUC"] = f"{self.auc.perturbed}, clean {self.auc.clean}"
        return f"{self.attack} at eps {eps_text(self.eps)} by class", lines

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per class and rate, and those of the AUC."""
        rows: list[dict[str, Any]] = []
        for one in self.classes:
            found = {"clean error": one.clean, "UER": one.uer, "class-wise UER": one.own}
            rows += [{"class": one.name, "what": what, **rate.plain()} for what, rate in found.items() if rate]
        if self.auc is not None:
            for what, rate in (("clean AUC", self.auc.clean), ("AUC", self.auc.perturbed)):
                rows.append({"class": self.auc.positive, "what": what, **rate.plain()})
        return notebook.frame(rows)

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the errors by class."""
        names = [one.name for one in self.classes]
        lines: dict[str, Any] = {
            "perturbed": (names, [one.uer for one in self.classes]),
            "clean": (names, [one.clean for one in self.classes]),
        }
        if own := [one.own for one in self.classes if one.own is not None]:
            lines["class-wise"] = [one.name for one in self.classes if one.own is not None], own
        return notebook.curves(lines, f"Error by class, eps {eps_text(self.eps)} ({self.norm})", "class", "error (%)")


def by_class(
    model: nn.Module,
    data: object,
    uap: UniversalPerturbation,
    class_wise: Mapping[int, UniversalPerturbation] | None = None,
    *,
    seed: int = 0,
) -> ClassView:
    """Measure the error of each class, clean and under a universal perturbation, and the AUC of two classes.

    Args:
        model: any module from pixels to logits.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used. Images that the
            perturbation was crafted on are left out.
        uap: the perturbation of all images.
        class_wise: perturbations of single classes by index, from
            :meth:`gambeson.attacks.ClasswiseStochasticPGD.craft_classes`. Whoever uses one knows the class of an image.
        seed: of a random model's votes.

    Raises:
        UserError: label maps, class-wise perturbations of other images, or as
            :func:`gambeson.evaluation.universal_evasion`.
    """
    split = scorable(data, uap)
    if any(len(scorable(split, one)) < len(split) for one in (class_wise or {}).values()):
        raise UserError("some images were used to craft the class-wise perturbations: score them on other images")
    deltas = {k: one.delta for k, one in (class_wise or {}).items()}
    with as_victim(model) as victim:
        clean, under = (
            split.counts(predict(victim, split, delta, seed=seed)) for delta in (None, uap.delta.to(victim.device))
        )
        return class_view(victim, split, uap, clean, under, deltas, seed=seed)


def class_view(
    victim: Victim,
    split: Split,
    uap: UniversalPerturbation,
    clean: Counts,
    under: Counts,
    deltas: Mapping[int, torch.Tensor] | None = None,
    *,
    seed: int = 0,
) -> ClassView:
    """As :func:`by_class`, from answers that are known, of a victim inside its context.

    Args:
        victim: the model.
        split: the images.
        uap: the perturbation of all images.
        clean: answers on the clean images.
        under: answers under the perturbation.
        deltas: perturbations (1, C, H, W) of single classes, by index.
        seed: of a random model's votes.
    """
    split.task.require_classification("rates of each class")
    labels = split.labels.cpu()
    parts = {k: (labels == k) & (clean.total > 0) for k in range(len(split.classes))}
    parts = {k: rows for k, rows in parts.items() if bool(rows.any())}

    def rate(counts: Counts, rows: torch.Tensor) -> Rate:
        return Rate.of(int(counts.wrong[rows].sum()), int(rows.sum()), candidates=len(parts))

    def own(k: int, rows: torch.Tensor) -> Rate | None:
        if deltas is None or k not in deltas:
            return None
        part = split.subset(rows)
        found = part.counts(predict(victim, part, deltas[k].to(victim.device), seed=seed))
        return rate(found, torch.ones(len(part), dtype=torch.bool))

    found = [
        ClassRates(name=split.classes[k], clean=rate(clean, rows), uer=rate(under, rows), own=own(k, rows))
        for k, rows in parts.items()
    ]
    auc = None
    if len(split.classes) == 2 and len(parts) == 2:
        used = split.subset(parts[0] | parts[1])
        truth = used.labels.cpu() == 1
        areas = [area_under_curve(margins(victim, used, delta, seed=seed), truth) for delta in (None, uap.delta)]
        auc = Auc(positive=split.classes[1], clean=areas[0], perturbed=areas[1])
    about = uap.about
    return ClassView(attack=about.attack, eps=about.eps, norm=about.norm, classes=found, auc=auc)


@torch.no_grad()
def margins(victim: Victim, split: Split, delta: torch.Tensor | None = None, *, seed: int = 0) -> torch.Tensor:
    """Return the logit of class 1 minus that of class 0, (N,) float64; of a random model the mean over its votes."""
    found = []
    with seeded(seed, "score"):
        for images, _ in split.batches(auto_batch_size(split.shape), device=victim.device):
            moved = images if delta is None else perturb(images, delta.to(images))
            draws = [victim.forward_original(moved) for _ in range(votes_of(victim, images))]
            found.append(torch.stack(draws).double().mean(0))
    logits = torch.cat(found).cpu()
    return logits[:, 1] - logits[:, 0]


def area_under_curve(scores: torch.Tensor, positive: torch.Tensor) -> Rate:
    """Return the area under the ROC curve: the share of pairs of both classes that scores order rightly, ties half.

    Its variance is that of DeLong et al. (Biometrics 1988), from the share of the other class that each image is placed
    above; the interval is Wilson's at the effective number of images that it amounts to (:class:`Rate`), which stays in
    [0, 1]. Where every pair is ordered rightly, or none, the variance is unknown and the images of the smaller class
    count.

    Args:
        scores: (N,), high for the positive class.
        positive: (N,) bool; both classes must occur.

    Raises:
        UserError: there are images of one class only, or a score is NaN.
    """
    above, below = scores[positive].double(), scores[~positive].double()
    few = min(len(above), len(below))
    if few == 0 or bool(scores.isnan().any()):
        raise UserError(
            f"{len(above)} scores of one class and {len(below)} of the other, {int(scores.isnan().sum())} of them NaN: "
            "expected numbers of both classes for an area under the ROC curve"
        )
    placed = _share_below(above, below), 1 - _share_below(below, above)
    value = float(placed[0].mean())
    if not 0 < value < 1:
        return Rate.from_variance(round(value), 0.0, len(scores), few)
    variance = sum(float(one.var()) / len(one) if few > 1 else 1.0 for one in placed)
    return Rate.from_variance(value, variance, len(scores), len(scores))


def _share_below(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return for each value the share of others that lie below it, those equal to it counted by half."""
    ordered = others.sort().values
    edges = [torch.searchsorted(ordered, values, right=right) for right in (False, True)]
    return (edges[0] + edges[1]).double() / (2 * len(others))
