"""The base class of defences, and objectives as weighted sums of terms, each a function of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.target import TAU, LabelSource
from gambeson.base import Config, Number, UserError, generator
from gambeson.data import Split
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import BatchNormMode, FastPath, Precision, Victim
from gambeson.victim.inspect import logits_of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch, with the random stream of its step."""

    images: torch.Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: torch.Tensor
    """(N,) or (N, H, W)."""
    seed: int
    """Names the draws of this step; equal seeds draw equally."""
    task: Task = CLASSIFICATION
    """What the labels mean."""
    place: tuple[int, int] = (0, 1)
    """Rank and world size; the batch of the step is cut into consecutive parts."""
    step: int = 0
    """Previous steps."""
    steps: int = 1
    """Steps per epoch."""
    epochs: int = 1
    indices: torch.Tensor | None = None
    """(N,) indices of the images in the training split, if they are not augmented."""
    forward_by: Callable[[nn.Module, torch.Tensor], Any] | None = None
    """Computes a model's output in another way, such as by CUDA graphs; see :meth:`forward`."""

    @property
    def epoch(self) -> int:
        """Previous epochs."""
        return self.step // self.steps

    @property
    def progress(self) -> float:
        """Finished share of the training, in [0, 1)."""
        return self.step / (self.steps * self.epochs)

    def forward(self, model: nn.Module, images: torch.Tensor) -> Any:
        """Return ``model(images)`` for a loss that is differentiated once, by one backward."""
        return model(images) if self.forward_by is None else self.forward_by(model, images)

    def losses(self, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the mean cross-entropy of each image (N,) over its units that count."""
        logits = logits_of(logits)  # of some models a tuple in training mode only
        values = self.task.cross_entropy(logits, self.labels, label_smoothing=label_smoothing)
        return self.task.per_image(values, self.labels)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over images of each image's mean over its units that count, of one value per unit."""
        return self.task.per_image(values, self.labels).mean()

    def mine(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of a draw for the batch of all processes.

        Drawing for all and taking a part makes several processes equal to one with the joined batch.
        """
        number, processes = self.place
        return drawn if processes == 1 else drawn.unflatten(0, (processes, -1))[number]


class Term(Protocol):
    """A term of an objective: a scalar function of a model and a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss, with a graph to the model's parameters."""
        ...


def batch_loss(model: nn.Module, images: torch.Tensor, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of ``images`` against the batch's labels."""
    return batch.losses(batch.forward(model, images), label_smoothing).mean()


class Clean(Config):
    """Cross-entropy on clean images."""

    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return batch_loss(model, batch.images, batch, self.label_smoothing)


class Adversarial(Config):
    """Cross-entropy on images perturbed on the model itself, with one perturbation per ``sharedness`` images.

    Heaps are consecutive rows of the shuffled batch. Crafting costs ``steps`` forwards and backwards of the batch for
    any sharedness. A targeted attack moves every heap towards one image of another: heaps 1 and 2, 3 and 4 and so on
    towards each other's first image. Pixels without a label, in either image, have no part in it.
    """

    eps: Eps
    norm: Norm = "inf"
    sharedness: Annotated[int, Field(ge=1)] = 1
    """Images that share one perturbation."""
    steps: Annotated[int, Field(ge=1)] = 4
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.5
    """Step size as a share of eps."""
    start: Literal["zero", "uniform", "sign"] = "uniform"
    truncate: Number | None = None
    """Untargeted inner loss only; see :class:`gambeson.attacks.Loss`."""
    target: LabelSource | None = None
    """Towards the prediction on that image, or its label or label map; None: away from the truth."""
    tau: Annotated[Number, Field(gt=0, le=1)] | None = TAU
    """Targeted inner loss only: no gradient where the target is likelier than this; None: no such limit."""
    precision: Precision = "float32"
    """Precision of the model while crafting, independent of the training's."""
    attack_bn: BatchNormMode = "eval"
    """BatchNorm statistics while crafting; see :data:`gambeson.victim.BatchNormMode`."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Outer loss only: in the truncated inner loss it would hide the easiest images from the attack."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy under the crafted perturbations."""
        return batch_loss(model, perturb(batch.images, self.craft(model, batch)), batch, self.label_smoothing)

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Craft the perturbations of a batch, shape (N / sharedness, C, H, W).

        The model's mode is restored, and so are its statistics unless ``attack_bn="train"``.

        Raises:
            UserError: the batch does not consist of heaps, two or more where they are targets of each other.
        """
        self.check(len(batch.images))
        heaps = len(batch.images) // self.sharedness
        loss = Loss(truncate=self.truncate) if self.target is None else Loss(targeted=True, tau=self.tau)
        # In evaluation mode on a fast copy, which is updated in every step.
        with Victim(model, fast=FastPath(precision=self.precision), batch_norm=self.attack_bn) as victim:
            solver = ProjectedGradient(
                victim=victim,
                ball=Ball(eps=self.eps, norm=self.norm),
                loss=loss,
                per_image=self.sharedness == 1,
                task=batch.task,
                place=batch.place,
            )
            draw = generator(batch.seed, "craft", device=batch.images.device)
            delta = solver.start(batch.images, heaps, self.start, 1.0, draw)
            again = [(batch.images, self._labels(victim, batch, heaps))] * self.steps
            return solver.run(delta, again, [self.rel_step_size * self.eps] * self.steps)

    def check(self, batch_size: int) -> None:
        """Raise if a batch cannot be split into heaps.

        Raises:
            UserError: the sharedness does not divide it, or leaves one heap without another as its target.
        """
        if batch_size % self.sharedness:
            raise UserError(
                f"sharedness {self.sharedness} does not divide the batch size {batch_size}: "
                f"choose a batch size that is a multiple of it, such as {self.sharedness * 2}"
            )
        if self.target is not None and batch_size == self.sharedness:
            raise UserError(
                f"a batch of {batch_size} is one heap of {self.sharedness}, and a targeted attack needs another as its "
                f"target: choose a batch size of {self.sharedness * 2} or more"
            )

    def _labels(self, victim: Victim, batch: Batch, heaps: int) -> torch.Tensor:
        """Return the labels to leave, or the targets to reach, in the shape of the batch's."""
        if self.target is None:
            return batch.labels
        number = torch.arange(heaps, device=batch.images.device)
        other = number ^ 1
        first = self.sharedness * other.where(other < heaps, number - 1)
        chosen = batch.labels[first]
        if self.target == "prediction":
            with torch.no_grad():
                chosen = batch.task.targets(victim(batch.images[first]).argmax(1), chosen)
        return batch.task.targets(chosen.repeat_interleave(self.sharedness, 0), batch.labels)


Losses = dict[str, torch.Tensor]
"""The value of each term, detached, and their weighted sum as ``loss``, with its graph."""

Weight = float | Callable[[Batch], float]
"""The weight of a term: a number, or a function of the batch."""


@runtime_checkable
class AfterStep(Protocol):
    """A term with a state that is updated in every step, such as a persistent perturbation."""

    def after_step(self, batch: Batch) -> None:
        """Update the state, after the backward of the objective and before the next batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """The context in which an objective is built."""

    model: nn.Module
    """The model to train, on its device."""
    train: Split
    """The training images, on that device if they fit."""
    seed: int
    epochs: int
    steps: int
    """Steps per epoch."""
    batch_size: int
    """Images per step in this process, of one data order."""


class Objective(nn.Module):
    """The objective of one training: its terms, with their state in buffers.

    Checkpoints include the buffers, so that an interrupted run resumes bit for bit.

    Args:
        terms: each term with its weight, by name. Terms that are modules are registered.
    """

    def __init__(self, terms: Mapping[str, tuple[Weight, Term]]) -> None:
        super().__init__()
        self.terms = dict(terms)
        self.carried = nn.ModuleDict({name: term for name, (_, term) in terms.items() if isinstance(term, nn.Module)})

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; terms of weight zero are skipped."""
        weights = {name: weight(batch) if callable(weight) else weight for name, (weight, _) in self.terms.items()}
        values = {name: self.terms[name][1](model, batch) for name, weight in weights.items() if weight}
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return {"loss": total} | {name: value.detach() for name, value in values.items()}

    def optimizer_steps(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        """Yield the optimiser steps on this batch: the losses, and the parameters to update.

        None updates all of them. A parameter that is not updated in a phase is unchanged bit for bit, including weight
        decay and momentum. Code after a ``yield`` sees the parameters after that step.
        """
        yield self.losses(model, batch), None

    def after_step(self, batch: Batch) -> None:
        """Update every term with a state."""
        for _, term in self.terms.values():
            if isinstance(term, AfterStep):
                term.after_step(batch)


@runtime_checkable
class WithLogits(Protocol):
    """A term whose evaluation also returns the logits of the clean batch, which saves one forward per step."""

    def with_logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the logits of ``batch.images`` with their graph, or None, and the value of the term."""
        ...


class SharedForward(Objective):
    """An objective whose clean term uses the logits of the first term that has them (:class:`WithLogits`)."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; without such a term bit-identical to :class:`Objective`."""
        weights = {name: weight(batch) if callable(weight) else weight for name, (weight, _) in self.terms.items()}
        live = {name: self.terms[name][1] for name, weight in weights.items() if weight}
        source = next((name for name, term in live.items() if isinstance(term, WithLogits)), None)
        if source is None or not any(isinstance(term, Clean) for term in live.values()):
            return super().losses(model, batch)
        term_with_logits = live[source]
        assert isinstance(term_with_logits, WithLogits)
        logits, its_value = term_with_logits.with_logits(model, batch)
        values = {}
        for name, term in live.items():
            if name == source:
                values[name] = its_value
            elif isinstance(term, Clean) and logits is not None:
                values[name] = batch.losses(logits, term.label_smoothing).mean()
            else:
                values[name] = term(model, batch)
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return {"loss": total} | {name: value.detach() for name, value in values.items()}


class Defense(Config):
    """Base of every defence. Subclasses are frozen configurations that define :meth:`terms`; the rest has defaults."""

    def terms(self) -> Mapping[str, tuple[Weight, Term]]:
        """Return each term of the objective with its weight, by name."""
        raise NotImplementedError

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective of one training, with fresh states of its terms."""
        return Objective(self.terms())

    def with_source_models(self, load: Callable[[str], nn.Module]) -> Defense:
        """Return this defence with its named source models loaded by ``load``; most have none."""
        return self

    def configure_model(self, model: nn.Module) -> None:
        """Add the parts that this defence needs, such as noise, to a model, in place and once.

        Raises:
            UserError: the model does not support them.
        """

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups with their own optimiser settings, as for ``torch.optim``.

        ``lr_scale`` multiplies the learning rate of a group.
        """
        return []

    @property
    def recipe(self) -> dict[str, Any]:
        """Fields of the training's recipe that take the place of its defaults; those that are given go before them."""
        return {}

    @property
    def num_members(self) -> int:
        """Number of members of the model."""
        return 1

    @property
    def num_orders(self) -> int:
        """Number of data orders, one per member; a batch concatenates their rows."""
        return self.num_members

    def fully_active_epoch(self, epochs: int) -> int:
        """Return the epoch from which all parts of the objective are active; only later epochs can be the best."""
        return 0

    def check(self, batch_size: int) -> None:
        """Raise before the training starts if the objective does not support the batch size."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate a stateless objective on one batch."""
        return Objective(self.terms()).losses(model, batch)
