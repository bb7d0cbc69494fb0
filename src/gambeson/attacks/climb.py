"""What Auto-PGD knows of each image while it climbs, and the best that was found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Climb:
    """One climb an image that still stands; every field has one row an image."""

    rows: torch.Tensor
    """Which images of the batch these are."""
    images: torch.Tensor
    labels: torch.Tensor
    """What the loss is taken of: labels, or targets."""
    truth: torch.Tensor
    """What decides whether an image has fallen; the same as ``labels`` but where an attack tries several targets."""
    delta: torch.Tensor
    before: torch.Tensor
    """``delta`` one step ago."""
    gradient: torch.Tensor
    value: torch.Tensor
    """Loss at ``delta``."""
    best: torch.Tensor
    """Point of highest loss so far, with its gradient and value below."""
    best_gradient: torch.Tensor
    best_value: torch.Tensor
    length: torch.Tensor
    """Step size, pixel units."""
    rises: torch.Tensor
    """Steps since the last checkpoint that raised the loss."""
    checked_value: torch.Tensor
    """Best value at the last checkpoint."""
    halved: torch.Tensor
    """Whether the step was halved at the last checkpoint."""

    def only(self, keep: torch.Tensor) -> Climb:
        """Return the climbs of some images."""
        return type(self)(**{field.name: getattr(self, field.name)[keep] for field in dataclasses.fields(self)})

    def arrive(self, delta: torch.Tensor, gradient: torch.Tensor, value: torch.Tensor) -> Climb:
        """Return the climbs after a step to ``delta``."""
        better = value > self.best_value
        chosen = better.view(-1, 1, 1, 1)
        return dataclasses.replace(
            self,
            delta=delta,
            before=self.delta,
            gradient=gradient,
            value=value,
            best=torch.where(chosen, delta, self.best),
            best_gradient=torch.where(chosen, gradient, self.best_gradient),
            best_value=torch.where(better, value, self.best_value),
            rises=self.rises + (value > self.value),
        )

    def judge(self, steps: int, rise: float) -> Climb:
        """Halve the step of the images whose loss has stopped rising, and send them back to their best point.

        Croce and Hein 2020, section 3.1: condition 1 is that fewer than a share ``rise`` of the ``steps`` since the
        last checkpoint raised the loss; condition 2 that neither the step nor the best loss has changed since then.
        What is repeated of the last step starts from nothing again (ours; the paper does not say).
        """
        halve = (self.rises < rise * steps) | (~self.halved & (self.best_value <= self.checked_value))
        back = halve.view(-1, 1, 1, 1)
        return dataclasses.replace(
            self,
            delta=torch.where(back, self.best, self.delta),
            before=torch.where(back, self.best, self.before),
            gradient=torch.where(back, self.best_gradient, self.gradient),
            value=torch.where(halve, self.best_value, self.value),
            length=torch.where(halve, self.length / 2, self.length),
            rises=torch.zeros_like(self.rises),
            checked_value=self.best_value,
            halved=halve,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """The best perturbation of each image of a batch: one that succeeds before one that does not, then by loss."""

    delta: torch.Tensor
    """(N, C, H, W); written in place."""
    value: torch.Tensor
    """(N,)"""
    fallen: torch.Tensor
    """(N,)"""

    @classmethod
    def into(cls, delta: torch.Tensor) -> Record:
        """Return an empty record that writes its perturbations into ``delta``."""
        value = delta.new_full((len(delta),), -torch.inf)
        return cls(delta=delta, value=value, fallen=torch.zeros_like(value, dtype=torch.bool))

    def note(self, rows: torch.Tensor, delta: torch.Tensor, value: torch.Tensor, fallen: torch.Tensor) -> None:
        """Keep what is better than before for the images ``rows``."""
        old_value, old_fallen = self.value[rows], self.fallen[rows]
        better = (fallen & ~old_fallen) | ((fallen == old_fallen) & (value > old_value))
        chosen = better.view(-1, 1, 1, 1)
        self.delta[rows] = torch.where(chosen, delta, self.delta[rows])
        self.value[rows] = torch.where(better, value, old_value)
        self.fallen[rows] = fallen | old_fallen
