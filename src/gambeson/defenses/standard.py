"""Ordinary training: empirical risk, no defence. The baseline of every table."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gambeson.base import Number
from gambeson.defenses.objective import Defense
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Clean, Term


@register("standard", cost="1 / 1")
class Standard(Defense):
    """Minimise E[CE(f(x), y)]."""

    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean term alone."""
        return {"clean": (1.0, Clean(label_smoothing=self.label_smoothing))}
