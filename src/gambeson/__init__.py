"""Gambeson: attack, harden and honestly judge vision models.

Universal adversarial perturbations (one perturbation that fools a model on most inputs) stand at the centre.
Images are float pixels in [0, 1], shape (N, C, H, W); every eps is in these units.
"""

from gambeson import (
    analysis,
    attacks,
    auditing,
    data,
    defenses,
    evaluation,
    models,
    report,
    testbed,
    threat,
    training,
    victim,
)
from gambeson.auditing import audit
from gambeson.base import UserError
from gambeson.training import train

__all__ = [
    "UserError",
    "analysis",
    "attacks",
    "audit",
    "auditing",
    "data",
    "defenses",
    "evaluation",
    "models",
    "report",
    "testbed",
    "threat",
    "train",
    "training",
    "victim",
]
