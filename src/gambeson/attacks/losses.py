"""Losses of gradient attacks, one value per image, for labels per image or per pixel."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from gambeson.base import Config, Number, UserError
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.tasks import answers as answered

LossName = Literal["cross-entropy", "margin", "dlr", "segpgd", "cospgd", "mce", "mce-bal", "js"]
"""What an attack can maximise, per label. The last five were made for label maps; they are the cross-entropy with
other weights w on the labels, so that the gradient with respect to the logits is w (softmax - one-hot label):

- ``cross-entropy``: w = 1 (:func:`cross_entropy`);
- ``margin``, ``dlr``: differences of logits (:func:`margin`, :func:`dlr`);
- ``segpgd`` (Gu et al. 2022): 1 - lambda where the answer is right, lambda where it is wrong, see :meth:`Loss.at`;
- ``cospgd`` (Agnihotri et al. 2024): the cosine of softmax and one-hot label (:func:`cosine`), held constant in the
  gradient, as in the authors' code;
- ``mce`` (Croce et al. 2024, section 3.4): 1 where the answer is right, 0 where it is wrong;
- ``mce-bal`` (the same): as ``mce``, divided by the number of pixels of the label's class, see
  :attr:`Loss.class_pixels`;
- ``js`` (the same): the Jensen-Shannon divergence (:func:`js`), w = p log(1 + 1 / p) / 2 of the label's softmax p.

Where labels are targets, right and wrong change places, and the cosine c becomes 1 - c."""

MASKED = ("segpgd", "cospgd", "mce", "mce-bal")
"""The losses that are the smaller the more answers are wrong: they guide steps and rank nothing."""
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


def cosine(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cosine of softmax and one-hot label, in (0, 1]: the weight of CosPGD (Agnihotri et al. 2024, equation 5).

    Shapes as in :func:`cross_entropy`.
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (own - torch.logsumexp(2 * logits, 1) / 2).exp()


def js(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of softmax and one-hot label, in [0, log 2] (Croce et al. 2024, section 3.4).

    In closed form, log 2 + (p log p - (1 + p) log(1 + p)) / 2 of the label's softmax p, which is finite also where p
    is rounded to zero. Shapes as in :func:`cross_entropy`.
    """
    log = -cross_entropy(logits, labels)
    p = log.exp()
    return math.log(2) + (p * log - (1 + p) * torch.log1p(p)) / 2


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
    truncate_margin: Number | None = None
    """By how much the truth's logit must also lie behind the likeliest wrong one's (ours). A model that is seldom sure
    finds the truth unlikely long before another class is clearly likelier: without it, answers that are still right
    have no gradient, and those that have only just fallen turn back. None: the loss alone, as in the paper."""
    tau: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Targeted only: answers whose target has a probability above this have no gradient (Metzen et al. 2017)."""
    wrong_weight: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """``segpgd`` only: the weight lambda of answers that are wrong; right ones have 1 - lambda."""
    class_pixels: tuple[Annotated[Number, Field(ge=0)], ...] | None = None
    """``mce-bal`` only: training pixels of each class, the paper's. None: those of the image itself (ours), so that
    every class in it has the same weight. Weights are scaled to mean 1, over the classes or over the image."""

    def at(self, step: int, steps: int) -> Loss:
        """Return the loss of a step, counted from 1: the lambda of ``segpgd`` is (step - 1) / (2 steps).

        From Gu et al. 2022, section 4.2. Other losses do not change.
        """
        if self.kind != "segpgd":
            return self
        return self.model_copy(update={"wrong_weight": (step - 1) / (2 * steps)})

    @property
    def may_vanish(self) -> bool:
        """Whether the gradient may be zero although the model has one: where every answer is wrong, or truncated."""
        return self.truncate is not None or self.tau is not None or self.kind in (*MASKED, "js")

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
        plain = answers.detach() if self.kind == "cross-entropy" else None
        if (own := self._weights(logits.detach(), labels, task)) is not None:
            answers = own * answers
        if self.targeted:
            answers = -(answers if self.truncate is None else answers.clamp(min=self.truncate))
        elif self.truncate is not None:
            cut = answers.clamp(max=self.truncate)
            least = self.truncate_margin
            answers = cut if least is None else torch.where(margin(logits.detach(), index) > least, cut, answers)
        if self.targeted and self.tau is not None:
            plain = cross_entropy(logits.detach(), index) if plain is None else plain
            reached = plain < -math.log(self.tau)
            answers = torch.where(reached, answers.detach(), answers)
        if weights is not None:
            answers = weights * answers
        return task.per_image(answers, labels)

    def _answers(self, logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of every answer, in the shape of ``labels``, none of which is the ignore index here."""
        used = self.used(logits.shape[1])
        if used == "js":
            return js(logits, labels)
        if used not in ("margin", "dlr"):
            return cross_entropy(logits, labels)
        if not self.targeted:
            return (margin if used == "margin" else dlr)(logits, labels)
        if used == "dlr":
            return -targeted_dlr(logits, labels, truth)
        if truth is None:
            return margin(logits, labels)
        return -target_margin(logits, labels, truth)

    def _weights(self, logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor | None:
        """Return the constant weight of every answer, in the shape of ``labels``; None where all are 1."""
        if self.kind not in MASKED:
            return None
        index = task.indexable(labels)
        if self.kind == "cospgd":
            alike = cosine(logits, index)
            return 1 - alike if self.targeted else alike
        standing = (task.matches(answered(logits), index) != self.targeted).to(logits.dtype)
        if self.kind == "segpgd":
            return self.wrong_weight + (1 - 2 * self.wrong_weight) * standing
        return standing if self.kind == "mce" else standing / self._frequency(logits, labels, task)

    def _frequency(self, logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
        """Return the frequency of every label's class relative to the mean, in the shape of ``labels``."""
        classes, index = logits.shape[1], task.indexable(labels)
        if self.class_pixels is not None:
            if len(self.class_pixels) != classes:
                raise UserError(
                    f"class_pixels has {len(self.class_pixels)} numbers and the model {classes} classes: give the "
                    "pixels of every class"
                )
            table = logits.new_tensor(self.class_pixels).clamp(min=1)
            return (table / table.mean())[index]
        units, counts = task.units(index), task.units(task.valid(labels)).to(logits.dtype)
        table = logits.new_zeros(len(logits), classes).scatter_add_(1, units, counts)
        mean = counts.sum(1, keepdim=True) / (table > 0).sum(1, keepdim=True).clamp(min=1)
        return (table.clamp(min=1) / mean.clamp(min=1)).gather(1, units).view_as(index)


def warn_of_fallback(loss: Loss, classes: int) -> None:
    """Warn if another loss replaces one that needs more classes than the model has."""
    if loss.used(classes) != loss.kind:
        warnings.warn(
            f"loss {loss.kind!r} needs more classes than the {classes} of this model: "
            f"the {loss.used(classes)} is used instead",
            stacklevel=2,
        )
