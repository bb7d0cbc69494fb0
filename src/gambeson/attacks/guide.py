"""What a step follows: the gradient, as momentum, look-ahead, resizing, smoothing and scaled copies make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gambeson.attacks.solver import Ascent
from gambeson.attacks.transforms import Diversity, Scales, Smoothing

_TINY = 1e-12
View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The transfer options of an attack; with all of them off a step follows the gradient to the bit."""

    ascent: Ascent
    momentum: float = 0.0
    nesterov: bool = False
    diversity: Diversity | None = None
    smoothing: Smoothing | None = None
    scales: Scales | None = None

    @property
    def sees_images(self) -> bool:
        """Whether the logits of a look are those of the perturbed images themselves."""
        return self.diversity is None and not self.nesterov

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """Draw what one step needs at random: for all images, so that none depends on which others still stand."""
        if self.diversity is None:
            return []
        copies = 1 if self.scales is None else self.scales.copies
        return [self.diversity.draw(images, generator) for _ in range(copies)]

    def look(
        self,
        delta: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        velocity: torch.Tensor,
        length: float,
        drawn: list[torch.Tensor],
        number: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the direction, the new velocity, and the logits of the first forward.

        Args:
            delta: (N, C, H, W).
            images: (N, C, H, W).
            labels: (N,) or (N, H, W).
            velocity: (N, C, H, W); at the first step zero, (N, 1, 1, 1).
            length: of the step to come, in pixel units.
            drawn: what :meth:`draw` returned, its rows chosen for these images.
            number: of the step, counted from 1.
        """
        point = delta
        if self.nesterov:  # kept in the box, where a clip would take the gradient of what lies beyond
            ahead = delta + self.ascent.scaled(length) * self.momentum * velocity
            point = torch.minimum(torch.maximum(ahead, -images), 1 - images)
        views = self._views(drawn)
        gradient, first = self.ascent.look(point, images, labels, view=views[0], number=number)
        for view in views[1:]:
            gradient = gradient + self.ascent.look(point, images, labels, view=view, number=number)[0]
        if len(views) > 1:
            gradient = gradient / len(views)
        if self.smoothing is not None:
            gradient = self.smoothing(gradient)
        if self.momentum == 0:
            return gradient, velocity, first
        velocity = self.momentum * velocity + self._unit(gradient)
        return velocity, velocity, first

    def _views(self, drawn: list[torch.Tensor]) -> list[View | None]:
        scaled: list[View | None] = [None] if self.scales is None else self.scales.views()
        if self.diversity is None:
            return scaled
        diversity = self.diversity
        return [_after(view, diversity, rows) for view, rows in zip(scaled, drawn, strict=True)]

    def _unit(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient at the size that a look-ahead of one step needs."""
        if self.ascent.ball.norm == "inf":
            size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        else:
            size = self.ascent.ball.length(gradient).view(-1, 1, 1, 1)
        return gradient / size.clamp(min=_TINY)


def _after(view: View | None, diversity: Diversity, drawn: torch.Tensor) -> View:
    return lambda images: diversity.view(images if view is None else view(images), drawn)
