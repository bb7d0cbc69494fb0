"""The terms an objective is a weighted sum of. A new term is a function of a model and a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss, cross_entropy, image_means
from gambeson.attacks.solver import Ascent
from gambeson.base import Config, Number, UserError, generator
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import BatchNormMode, Fast, Precision, Victim


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch and the stream that its random draws come from."""

    images: torch.Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: torch.Tensor
    """(N,) or (N, H, W)."""
    seed: int
    """Names the draws of this step; equal seeds draw equally."""
    ignore_index: int | None = None
    place: tuple[int, int] = (0, 1)
    """The number of this process, and of how many: the batch of the step is cut into consecutive parts."""
    step: int = 0
    """Steps taken before this one."""
    steps: int = 1
    """Steps an epoch."""
    epochs: int = 1
    indices: torch.Tensor | None = None
    """(N,) places of the images in the training split, where they are as they stand there: not augmented."""

    @property
    def epoch(self) -> int:
        """Epochs finished before this one."""
        return self.step // self.steps

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return self.step / (self.steps * self.epochs)

    def mine(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of what was drawn for the batch of all processes.

        Drawing for all and taking a part makes several processes do what one with the joined batch would do.
        """
        number, processes = self.place
        return drawn if processes == 1 else drawn.unflatten(0, (processes, -1))[number]


class Term(Protocol):
    """What an objective adds up: a scalar of a model on a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss, with a graph to the model's parameters."""
        ...


def batch_loss(model: nn.Module, images: torch.Tensor, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of ``images`` against the batch's labels."""
    answers = cross_entropy(model(images), batch.labels, batch.ignore_index, label_smoothing=label_smoothing)
    return image_means(answers, batch.labels, batch.ignore_index).mean()


class Clean(Config):
    """Cross-entropy on the images as they are."""

    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return batch_loss(model, batch.images, batch, self.label_smoothing)


class Adversarial(Config):
    """Cross-entropy on images perturbed against the model itself, one perturbation shared by ``sharedness`` images.

    The heaps are consecutive rows of the shuffled batch. Crafting costs ``steps`` forwards and backwards of the
    batch whatever the sharedness is.
    """

    eps: Eps
    norm: Norm = "inf"
    sharedness: Annotated[int, Field(ge=1)] = 1
    """Images that share one perturbation."""
    steps: Annotated[int, Field(ge=1)] = 4
    step: Annotated[Number, Field(gt=0)] = 0.5
    """Length of a step as a share of eps."""
    start: Literal["zero", "uniform", "sign"] = "uniform"
    truncate: Number | None = None
    """Inner loss only; see :class:`gambeson.attacks.Loss`."""
    precision: Precision = "float32"
    """Of the model while crafting, whatever the training's is; the step itself and the outer loss are not touched."""
    attack_bn: BatchNormMode = "eval"
    """The statistics that BatchNorm takes while crafting; see :data:`gambeson.victim.BatchNormMode`."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Outer loss only: in the truncated inner loss it would blind the attack to its easiest images."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy under the crafted perturbations."""
        return batch_loss(model, perturb(batch.images, self.craft(model, batch)), batch, self.label_smoothing)

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Craft the perturbations of a batch, shape (N / sharedness, C, H, W).

        The model comes back in the mode it was in, and with its statistics but for ``attack_bn="train"``.

        Raises:
            UserError: the sharedness does not divide the batch.
        """
        heaps, rest = divmod(len(batch.images), self.sharedness)
        if rest:
            raise UserError(
                f"sharedness {self.sharedness} does not divide the batch of {len(batch.images)}: "
                "choose a batch size that is a multiple of it"
            )
        # In evaluation mode by a copy, which follows the weights from step to step.
        with Victim(model, fast=Fast(precision=self.precision), batch_norm=self.attack_bn) as victim:
            ascent = Ascent(
                victim=victim,
                ball=Ball(eps=self.eps, norm=self.norm),
                loss=Loss(truncate=self.truncate),
                per_image=self.sharedness == 1,
                ignore_index=batch.ignore_index,
                place=batch.place,
            )
            draw = generator(batch.seed, "craft", device=batch.images.device)
            delta = ascent.start(batch.images, heaps, self.start, 1.0, draw)
            again = [(batch.images, batch.labels)] * self.steps
            return ascent.run(delta, again, [self.step * self.eps] * self.steps)
