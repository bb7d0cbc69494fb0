"""Losses of gradient attacks, one value per image, for labels per image or per pixel."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from gambeson.base import Config, Number
from gambeson.tasks import CLASSIFICATION, Task

LossName = Literal["cross-entropy", "margin", "dlr"]
"""What an attack can maximise: :func:`cross_entropy`, :func:`margin` or :func:`dlr`."""

_TINY = 1e-12


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every answer.

    Args:
        logits: (N, K) or (N, K, H, W).
        labels: (N,) or (N, H, W), each of them a class.

    Returns:
        Losses in the shape of ``labels``.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the label's logit (Carlini and Wagner 2017, f6): positive where the answer is wrong.

    Shapes as in :func:`cross_entropy`.
    """
    index = labels.unsqueeze(1)
    own = logits.gather(1, index).squeeze(1)
    others = logits.scatter(1, index, -torch.inf).amax(1)
    return others - own


def target_margin(logits: torch.Tensor, targets: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Logit of the target minus that of the true class; shapes as in :func:`cross_entropy`."""
    pair = logits.gather(1, torch.stack([truth, targets], 1))
    return pair[:, 1] - pair[:, 0]


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6): the margin over the first minus the third logit.

    It does not change when logits are shifted or scaled, so that a model cannot hide its gradient by large logits.
    Shapes as in :func:`cross_entropy`; needs three classes or more.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits: torch.Tensor, targets: torch.Tensor, truth: torch.Tensor | None = None) -> torch.Tensor:
    """The targeted ratio (Croce and Hein 2020, equation 7), to be raised; shapes as in :func:`cross_entropy`.

    The target's logit minus the true class's, over the first logit minus the mean of the third and fourth. Without
    ``truth`` the best other class stands for it (our choice). Needs four classes or more.
    """
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    ahead = -margin(logits, targets) if truth is None else target_margin(logits, targets, truth)
    return ahead / scale


class Loss(Config):
    """An attack's objective: what each answer contributes, and from where on it contributes nothing."""

    kind: LossName = "cross-entropy"
    """What is maximised."""
    targeted: bool = False
    """Labels are targets to reach; otherwise they are truths to leave."""
    truncate: Number | None = None
    """Answers whose loss is beyond this have no gradient, so that the effort goes to those not yet fooled
    (Mummadi et al. 2019: -log 0.2 of cross-entropy). It acts per answer, before any mean. For a targeted
    attack it is the floor of the loss below which an answer counts as reached."""
    truncate_correct: bool = True
    """Whether it holds for answers that are still right, too, as in the paper. Of many classes, or with a high
    temperature, the truth is unlikely long before another class is likelier."""
    tau: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Targeted only: answers whose target has a probability above this have no gradient (Metzen et al. 2017)."""

    @property
    def may_vanish(self) -> bool:
        """Whether the gradient may be zero although the model has one: where every answer is truncated."""
        return self.truncate is not None or self.tau is not None

    def used(self, classes: int) -> LossName:
        """What is really maximised on a model with this many classes.

        The ratio needs a third logit, targeted a fourth: with fewer classes it has no meaning, and the margin, its
        numerator, is maximised in its place.
        """
        if self.kind == "dlr" and classes < (4 if self.targeted else 3):
            return "margin"
        return self.kind

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        task: Task = CLASSIFICATION,
        truth: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the value to maximise, one per image: (N,).

        Args:
            logits: (N, K) or (N, K, H, W).
            labels: (N,) or (N, H, W); targets where ``targeted``.
            task: what the labels mean; units that do not count contribute nothing.
            truth: true labels, where a targeted margin or ratio shall measure the target against them.
            weights: of every answer, in the shape of ``labels``; None: all 1.
        """
        if truth is not None:  # a target does not count where the truth does not
            labels, truth = task.targets(labels, truth), task.indexable(truth)
        index = task.indexable(labels)
        answers = self._answers(logits, index, truth)
        if self.targeted:
            answers = -(answers if self.truncate is None else answers.clamp(min=self.truncate))
        elif self.truncate is not None:
            cut = answers.clamp(max=self.truncate)
            answers = cut if self.truncate_correct else torch.where(task.matches(logits.argmax(1), index), answers, cut)
        if self.targeted and self.tau is not None:
            reached = cross_entropy(logits.detach(), index) < -math.log(self.tau)
            answers = torch.where(reached, answers.detach(), answers)
        if weights is not None:
            answers = weights * answers
        return task.per_image(answers, labels)

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
