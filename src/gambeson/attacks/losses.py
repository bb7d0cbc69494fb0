"""Losses of gradient attacks, one value per image, for labels per image or per pixel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from gambeson.base import Config, Number

LossName = Literal["cross-entropy", "margin", "dlr"]
"""What an attack can climb: :func:`cross_entropy`, :func:`margin` or :func:`dlr`."""

_TINY = 1e-12

IGNORE = -100
"""What ``ignore_index`` becomes where a data set has none: a label that never occurs."""


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int | None = None,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of every answer, zero where the label is the ignore index.

    Args:
        logits: (N, K) or (N, K, H, W).
        labels: (N,) or (N, H, W).
        ignore_index: the label that counts nowhere.
        label_smoothing: share of the target spread over all classes.

    Returns:
        Losses in the shape of ``labels``.
    """
    ignored = IGNORE if ignore_index is None else ignore_index
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=ignored, label_smoothing=label_smoothing)


def margin(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    """Best wrong logit minus the label's logit (Carlini and Wagner 2017, f6): positive where the answer is wrong.

    Shapes as in :func:`cross_entropy`.
    """
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    index = labels.where(counts, torch.zeros_like(labels)).unsqueeze(1)
    own = logits.gather(1, index).squeeze(1)
    others = logits.scatter(1, index, -torch.inf).amax(1)
    return (others - own) * counts


def target_margin(
    logits: torch.Tensor, targets: torch.Tensor, truth: torch.Tensor, ignore_index: int | None = None
) -> torch.Tensor:
    """Logit of the target minus that of the true class; shapes as in :func:`cross_entropy`."""
    counts = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
    pair = logits.gather(1, torch.stack([truth, targets], 1) * counts.unsqueeze(1))
    return (pair[:, 1] - pair[:, 0]) * counts


def dlr(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6): the margin over the first minus the third logit.

    It does not change when logits are shifted or scaled, so that a model cannot hide its gradient by large logits.
    Shapes as in :func:`cross_entropy`; needs three classes or more.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, labels, ignore_index) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(
    logits: torch.Tensor,
    targets: torch.Tensor,
    truth: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """The targeted ratio (Croce and Hein 2020, equation 7), to be raised; shapes as in :func:`cross_entropy`.

    The target's logit minus the true class's, over the first logit minus the mean of the third and fourth. Without
    ``truth`` the best other class stands for it (our choice). Needs four classes or more.
    """
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    ahead = (
        -margin(logits, targets, ignore_index) if truth is None else target_margin(logits, targets, truth, ignore_index)
    )
    return ahead / scale


def image_means(answers: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    """Average the losses of each image over its labelled answers: (N,) from (N,) or (N, H, W)."""
    if labels.ndim == 1:
        return answers
    counts = torch.ones_like(labels) if ignore_index is None else labels != ignore_index
    return answers.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


def is_adversarial(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None, *, targeted: bool = False
) -> torch.Tensor:
    """Whether an attack has succeeded on an image, shape (N,).

    Every labelled answer must differ from its label (or, where ``targeted``, equal its target): for one label an
    image that is misclassification.
    """
    hit = (logits.argmax(1) == labels) if targeted else (logits.argmax(1) != labels)
    if ignore_index is not None:
        hit |= labels == ignore_index
    return hit if labels.ndim == 1 else hit.flatten(1).all(1)


class Loss(Config):
    """An attack's objective: what each answer contributes, and from where on it contributes nothing."""

    kind: LossName = "cross-entropy"
    """What is climbed."""
    targeted: bool = False
    """Labels are targets to reach; otherwise they are truths to leave."""
    truncate: Number | None = None
    """Answers whose loss is beyond this have no gradient, so that the effort goes to those not yet fooled
    (Mummadi et al. 2019: -log 0.2 of cross-entropy). It acts per answer, before any mean. For a targeted
    attack it is the floor of the loss below which an answer counts as reached."""
    truncate_correct: bool = True
    """Whether it holds for answers that are still right, too, as in the paper. Of many classes, or with a high
    temperature, the truth is unlikely long before another class is likelier."""

    def used(self, classes: int) -> LossName:
        """What is really climbed on a model with this many classes.

        The ratio needs a third logit, targeted a fourth: with fewer classes it has no meaning, and the margin, its
        numerator, is climbed in its place.
        """
        if self.kind == "dlr" and classes < (4 if self.targeted else 3):
            return "margin"
        return self.kind

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int | None = None,
        truth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the value to climb, one per image: (N,).

        Args:
            logits: (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W); targets where ``targeted``.
            ignore_index: the label that counts nowhere.
            truth: true labels, where a targeted margin or ratio shall measure the target against them.
        """
        counts = None
        if ignore_index is not None:  # an ignored answer has no index to gather; it is computed as if, and left out
            counts = labels != ignore_index
            counts = counts if truth is None else counts & (truth != ignore_index)
            labels = labels.where(counts, 0)
            truth = truth if truth is None else truth.where(counts, 0)
        answers = self._answers(logits, labels, truth)
        if self.targeted:
            answers = -(answers if self.truncate is None else answers.clamp(min=self.truncate))
        elif self.truncate is not None:
            cut = answers.clamp(max=self.truncate)
            answers = cut if self.truncate_correct else torch.where(logits.argmax(1) == labels, answers, cut)
        if counts is None:
            return image_means(answers, labels)
        return image_means(answers.where(counts, 0), labels.where(counts, IGNORE), IGNORE)

    def _answers(self, logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of every answer, in the shape of ``labels``, none of which is the ignore index here."""
        used = self.used(logits.shape[1])
        if used == "cross-entropy":
            return cross_entropy(logits, labels)
        if not self.targeted:
            return (margin if used == "margin" else dlr)(logits, labels)
        if used == "dlr":
            return -targeted_dlr(logits, labels, truth)
        if truth is None:
            return margin(logits, labels)
        return -target_margin(logits, labels, truth)
