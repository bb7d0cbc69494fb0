"""Attacks, one file a family. Every gradient attack is a loop over one projected-gradient step."""

from gambeson.attacks.controls import CONTROLS, control
from gambeson.attacks.gradient import FGSM, PGD, RFGSM
from gambeson.attacks.losses import Loss, cross_entropy, margin
from gambeson.attacks.perturbation import UniversalPerturbation
from gambeson.attacks.registry import create, names
from gambeson.attacks.solver import Ascent
from gambeson.attacks.universal import StochasticPGD

__all__ = [
    "CONTROLS",
    "FGSM",
    "PGD",
    "RFGSM",
    "Ascent",
    "Loss",
    "StochasticPGD",
    "UniversalPerturbation",
    "control",
    "create",
    "cross_entropy",
    "margin",
    "names",
]
