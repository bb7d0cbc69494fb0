"""What a gradient attack climbs: one number an image, whether it has one label or one a pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gambeson.base import Config, Number

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
    return F.cross_entropy(
        logits, labels, reduction="none", ignore_index=ignored, label_smoothing=label_smoothing
    )


def margin(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    """Best wrong logit minus the label's logit (Carlini and Wagner 2017, f6): positive where the answer is wrong.

    Shapes as in :func:`cross_entropy`.
    """
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    index = labels.where(counts, torch.zeros_like(labels)).unsqueeze(1)
    own = logits.gather(1, index).squeeze(1)
    others = logits.scatter(1, index, -torch.inf).amax(1)
    return (others - own) * counts


def image_means(answers: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    """Average the losses of each image over its labelled answers: (N,) from (N,) or (N, H, W)."""
    if labels.ndim == 1:
        return answers
    counts = torch.ones_like(labels) if ignore_index is None else labels != ignore_index
    return answers.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


def fallen(
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

    margin: bool = False
    """Climb the margin of the logits instead of the cross-entropy."""
    targeted: bool = False
    """Labels are targets to reach; otherwise they are truths to leave."""
    truncate: Number | None = None
    """Answers whose loss is beyond this have no gradient, so that the effort goes to those not yet fooled
    (Mummadi et al. 2019: -log 0.2 of cross-entropy). It acts per answer, before any mean. For a targeted
    attack it is the floor of the loss below which an answer counts as reached."""

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None
    ) -> torch.Tensor:
        """Return the value to climb, one an image: (N,)."""
        answers = (margin if self.margin else cross_entropy)(logits, labels, ignore_index)
        if self.targeted:
            answers = -(answers if self.truncate is None else answers.clamp(min=self.truncate))
        elif self.truncate is not None:
            answers = answers.clamp(max=self.truncate)
        return image_means(answers, labels, ignore_index)
