"""Settings of a hardening, what is decided by its time, and its expected cost."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from gambeson.auditing import AuditPlan, Suite
from gambeson.auditing.run import AuditSuite
from gambeson.base import Config, Number
from gambeson.threat import Eps, Norm
from gambeson.training import TrainingCost


class Hardening(Config):
    """Settings of a hardening, of any model on any data."""

    eps: Eps | None = None
    """Radius in pixel units; None: 0.2 for grey images, 8/255 for others."""
    norm: Norm = "inf"
    minutes: Annotated[Number, Field(gt=0)] | None = None
    """For everything: half of those left after loading for the training, a quarter for each audit. None: no limit."""
    keep_accuracy: Annotated[Number, Field(ge=0, le=100)] = 1.0
    """Points of clean accuracy that may be lost, measured on validation."""
    suite: AuditSuite | None = None
    """Suite of both audits, at eps / 2, eps and 3/2 eps; with ``minutes``, what of it fits. None: ``quick``, and
    ``full`` with ``minutes``."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`gambeson.training.Recipe` in place of those of hardening, such as ``lr`` or ``augment``."""
    defense: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`gambeson.defenses.Gambeson`; ``speed`` is the largest number of epochs, 10 or 40."""
    seed: int = 0


class Schedule(Config):
    """What of a hardening is decided by the time: it is measured once, and kept for a resumed run."""

    epochs: int
    """Passes over the training split, at the most."""
    robust_every: int
    """Epochs from one look of the attacks of validation to the next."""
    suite: Suite
    """Of the audit before; its limit of time is that of one audit."""
    base: float
    """Accuracy of the model as it came, on clean validation images."""
    original: dict[str, float] = Field(default_factory=dict)
    """What an entry of the history would be of the model as it came; empty until it was attacked."""
    ended: list[str] | None = None
    """What ended the training early, as sentences; None: it goes on."""
    settings: dict[str, Any]
    """Of the hardening, and the fingerprints of model and data."""


class HardenPlan(Config):
    """The expected cost of a hardening."""

    epochs: int
    """Passes over the training split, at the most."""
    training: TrainingCost
    seconds: float
    """Of the training, with its validation."""
    audit: AuditPlan
    """Of one of the two audits, at the most."""

    @property
    def total(self) -> float:
        """Seconds of training and audits."""
        return self.seconds + 2 * self.audit.seconds
