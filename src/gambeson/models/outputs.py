"""Outputs of models made logits: out of mappings, of probabilities, of coarser grids, of fixed batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from gambeson.base import UserError

KEYS = ("logits", "out")
"""Keys of the logits in a mapping, as used by transformers and by torchvision's segmentation models."""


def at_image_size(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return logits (N, K, h, w) of a coarser grid at the size of the images, and any others unchanged.

    Segmentation models that predict every s-th row and column, such as SegFormer, are meant to be upsampled, and the
    class is the argmax *afterwards*. This is the one place where that is done, for training, attacks, scores and
    exports: bilinear with ``align_corners=False`` (pixels are areas, as torchvision's and transformers' models have
    it), in float32 or better, with a gradient. A coarser grid is one whose two sides are those of the images divided
    by one whole number, rounded up or down; logits of any other size, such as those of unpadded convolutions, lie
    elsewhere in the image, and a single row of logits (1x1) belongs to the image: both remain, and
    :meth:`gambeson.tasks.Task.check_logits` refuses them for label maps.

    Args:
        logits: (N, K), (N, K, h, w) or anything else.
        images: (N, C, H, W).
    """
    size = images.shape[2:]
    if logits.ndim != 4 or logits.shape[2:] == size or not _is_coarser(*logits.shape[2:], *size):
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", align_corners=False)


def _is_coarser(rows: int, columns: int, height: int, width: int) -> bool:
    if min(rows, columns) == 0 or rows == columns == 1:
        return False
    steps = range(2, max(height, width))
    return any(rows in (height // s, -(-height // s)) and columns in (width // s, -(-width // s)) for s in steps)


PROBABILITIES, SIGMOID, ONE_LOGIT = "probabilities", "sigmoid", "one-logit"
_TINY = 1e-30
_ROUNDING = 1e-3
"""How far probabilities may lie outside [0, 1], and their sum from 1 (ours): sums of weights do by rounding."""


_checked: WeakSet[nn.Module] = WeakSet()


def are_shares(scores: torch.Tensor) -> torch.Tensor:
    """Tell whether all scores lie in [0, 1], up to rounding; a scalar tensor, which no device is waited for."""
    return ((scores >= -_ROUNDING) & (scores <= 1 + _ROUNDING)).all()


def are_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Tell whether scores (N, K) or (N, K, H, W) are shares that sum to 1 over the classes, likewise."""
    return are_shares(scores) & ((scores.sum(1) - 1).abs() < _ROUNDING).all()


class as_logits(nn.Module):  # noqa: N801  (used like a function)
    """Wrap a model so that it returns logits, at the size of the images if they are per pixel (:func:`at_image_size`).

    Args:
        model: any module.
        output: what the model returns: ``probabilities`` of the classes, whose logarithm is then returned; ``sigmoid``,
            a probability of its own for each class, whose inverse is returned; ``one-logit``, the logit of the second
            of two classes, (N,), (N, 1), (N, H, W) or (N, 1, H, W), beside which the first gets 0, so that its sigmoid
            is their softmax (a sigmoid of one class is read likewise); or the key of the logits in a mapping, of which
            ``logits`` and ``out`` also stand for a tensor of them. What a softmax or a sigmoid has rounded to 0 or 1
            has no gradient any more: leave the last layer out where you can. Of an object the key is an attribute, of a
            tuple a number, as in ``"0"``.

    Raises:
        UserError: from ``forward``, for any other output.
    """

    def __init__(self, model: nn.Module, output: str = PROBABILITIES) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of images (N, C, H, W)."""
        answer: Any = self.model(images)
        if self.output in (PROBABILITIES, SIGMOID, ONE_LOGIT):
            if isinstance(answer, torch.Tensor):
                return at_image_size(self._logits(answer, images), images)
        elif isinstance(answer, torch.Tensor):
            if self.output in KEYS:
                return at_image_size(answer, images)
        else:
            inside = dict(enumerate(answer)) if isinstance(answer, tuple | list) else answer
            key = int(self.output) if self.output.isdecimal() and inside is not answer else self.output
            found = inside.get(key) if isinstance(inside, Mapping) else getattr(answer, self.output, None)
            if isinstance(found, torch.Tensor):
                return at_image_size(found, images)
        keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise UserError(
            f"the model returned {type(answer).__name__}{keys}, from which {self.output!r} cannot be read: name "
            "`probabilities`, `sigmoid` or `one-logit` for a tensor of them, or the key of the logits"
        )

    def _check(self, answer: torch.Tensor) -> None:
        """Check, at the first call, that the values can be what they are said to be."""
        low, high = (float(bound) for bound in torch.aminmax(answer.detach()))
        inside = bool(are_shares(answer.detach()))
        if self.output != ONE_LOGIT and not inside:
            raise UserError(
                f"the model's outputs reach from {low:.3g} to {high:.3g}: expected {self.output} in [0, 1]; leave "
                "as_logits out for logits, or name `one-logit` for a single one"
            )
        if self.output == ONE_LOGIT and inside and low < high and len(answer) >= 8:
            warnings.warn(
                "all outputs of the model lie in [0, 1]: if they are probabilities, name `sigmoid`, not `one-logit`",
                stacklevel=4,
            )
        _checked.add(self)

    def _logits(self, answer: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if self not in _checked and answer.numel() and bool(answer.isfinite().all()):
            self._check(answer)
        if self.output == PROBABILITIES:
            return answer.clamp(min=_TINY).log()
        if self.output == SIGMOID:
            answer = answer.clamp(min=_TINY).log() - (1 - answer).clamp(min=_TINY).log()
        if answer.ndim in (1, 3):
            answer = answer.unsqueeze(1)
        if answer.shape[1] == 1:
            return torch.cat([torch.zeros_like(answer), answer], 1)
        if self.output == ONE_LOGIT:
            raise UserError(f"the model returned shape {tuple(answer.shape)}: expected one logit per image or pixel")
        return answer


class fixed_batch(nn.Module):  # noqa: N801  (used like a function)
    """Wrap a model that takes a fixed number of images, or a multiple of a number, so that it takes any.

    A last, smaller part is padded with copies of the last image, whose logits are dropped.

    Args:
        model: from (N, C, H, W) to logits, one row per image, each independent of the others.
        size: the number of images it takes.
        multiple: it takes any multiple of ``size`` at once, such as an even number; otherwise exactly ``size``.
    """

    def __init__(self, model: nn.Module, size: int, *, multiple: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size = {size}: expected the number of images that the model takes")
        self.model, self.size, self.multiple = model, size, multiple

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, ...) of images (N, C, H, W)."""
        padding = images[-1:].expand(-len(images) % self.size, -1, -1, -1)
        padded = torch.cat([images, padding]) if len(padding) else images
        parts = [padded] if self.multiple else padded.split(self.size)
        answers = [self.model(part) for part in parts]
        squeezed = [answer[None] if answer.ndim in (1, 3) else answer for answer in answers]  # a part of one image
        return torch.cat(squeezed)[: len(images)]
