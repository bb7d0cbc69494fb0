"""Norm balls: project on them, draw from them, take the steepest step in them.

Every function works on each leading row of a tensor (R, C, H, W) alone, so one ball serves one
perturbation an image (R = N), one a heap (R = N / s) and one for all (R = 1).
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from gambeson.base import Config, Number

Eps = Annotated[Number, Field(ge=0)]
"""A radius in pixel units (images are in [0, 1]); text such as ``8/255`` is accepted."""

Norm = Annotated[Literal["inf", "2"], BeforeValidator(lambda value: str(value).lower().removeprefix("l"))]
"""``inf`` (largest change of a pixel) or ``2`` (Euclidean length); ``linf``, ``l2`` and 2 are read too."""

_TINY = 1e-12


class Ball(Config):
    """All perturbations whose norm is at most eps."""

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"

    @model_validator(mode="after")
    def _check_unit(self) -> Ball:
        if self.norm == "inf" and self.eps > 1:
            raise ValueError(f"eps = {self.eps:g}, but pixels are in [0, 1]; did you mean {self.eps:g}/255?")
        return self

    @cached_property
    def _radius(self) -> float:
        """The largest float32 that is not above eps, so that no float32 perturbation ever leaves the ball."""
        nearest = torch.tensor(self.eps, dtype=torch.float32)
        below = torch.nextafter(nearest, torch.zeros(()))
        return float(nearest if float(nearest) <= self.eps else below)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the nearest point of the ball to each row, in Euclidean distance."""
        if self.norm == "inf":
            return delta.clamp(-self._radius, self._radius)
        return delta * (self.eps / _lengths(delta).clamp(min=_TINY)).clamp(max=1)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the direction of unit norm along which a linear function with this gradient rises fastest.

        A row whose gradient is zero gets the zero direction.
        """
        if self.norm == "inf":
            return gradient.sign()
        return gradient / _lengths(gradient).clamp(min=_TINY)

    def uniform(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw rows uniformly from the ball, on the generator's device."""
        if self.norm == "inf":
            return (torch.rand(shape, generator=generator, device=generator.device) * 2 - 1) * self._radius
        direction = torch.randn(shape, generator=generator, device=generator.device)
        radius = torch.rand(len(direction), generator=generator, device=generator.device)
        radius = radius.pow(1 / max(1, direction[0].numel())).view(-1, *[1] * (direction.ndim - 1))
        return direction / _lengths(direction).clamp(min=_TINY) * radius * self.eps

    def signs(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw rows of independent random signs, scaled to the surface of the ball."""
        draw = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        return self.fill(draw.float() * 2 - 1)

    def fill(self, pattern: torch.Tensor) -> torch.Tensor:
        """Scale each row so that its norm is eps: the strongest form of a fixed pattern."""
        if self.norm == "inf":
            return pattern / pattern.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=_TINY) * self._radius
        return pattern / _lengths(pattern).clamp(min=_TINY) * self.eps

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the norm of each row, shape (R,)."""
        rows = delta.flatten(1)
        return rows.abs().amax(1) if self.norm == "inf" else rows.norm(dim=1)


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(1).norm(dim=1).view(-1, *[1] * (rows.ndim - 1))
