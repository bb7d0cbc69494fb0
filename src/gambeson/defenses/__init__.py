"""Defences, one file a paper: the objective that training minimises."""

from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial
from gambeson.defenses.objective import Defense, Follows, Losses, Objective, Scene, Weight
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.defenses.registry import create, name_of, names, needs_eps
from gambeson.defenses.shared_adversarial import SharedAdversarial
from gambeson.defenses.standard import Standard
from gambeson.defenses.terms import Adversarial, Batch, Clean, Term

__all__ = [
    "Adversarial",
    "Batch",
    "Clean",
    "Defense",
    "EnsembleAdversarial",
    "Follows",
    "Losses",
    "Objective",
    "PGDAdversarial",
    "Scene",
    "SharedAdversarial",
    "Standard",
    "Term",
    "Weight",
    "create",
    "name_of",
    "names",
    "needs_eps",
]
