"""Defences, one file per paper, each an objective that training minimises."""

from gambeson.defenses.bank_started import BankStarted, Gambeson
from gambeson.defenses.combination import Combination
from gambeson.defenses.ensemble import Ensemble
from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial
from gambeson.defenses.ensemble_diversity import ADP, GAL, TRS
from gambeson.defenses.free_adversarial import FreeAdversarial
from gambeson.defenses.jacobian import Jacobian, JacobianNorm
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.defenses.learn2perturb import Learn2Perturb
from gambeson.defenses.n_fgsm import NFGSM
from gambeson.defenses.noise_injection import PNI, RSE
from gambeson.defenses.objective import (
    Adversarial,
    AfterStep,
    Batch,
    Clean,
    Defense,
    Losses,
    Objective,
    Term,
    TrainContext,
    Weight,
)
from gambeson.defenses.pgd_adversarial import PGDAdversarial, Standard
from gambeson.defenses.registry import AnyDefense, create, entry, name_of, names, register
from gambeson.defenses.shared_adversarial import SharedAdversarial
from gambeson.defenses.trades import Trades
from gambeson.defenses.universal_adversarial import UniversalAdversarial
from gambeson.defenses.universal_consistency import UniversalConsistency

__all__ = [
    "ADP",
    "GAL",
    "NFGSM",
    "PNI",
    "RSE",
    "TRS",
    "Adversarial",
    "AfterStep",
    "AnyDefense",
    "BankStarted",
    "Batch",
    "Clean",
    "Combination",
    "Defense",
    "Ensemble",
    "EnsembleAdversarial",
    "FreeAdversarial",
    "Gambeson",
    "Jacobian",
    "JacobianEnsemble",
    "JacobianNorm",
    "Learn2Perturb",
    "Losses",
    "Objective",
    "PGDAdversarial",
    "SharedAdversarial",
    "Standard",
    "Term",
    "Trades",
    "TrainContext",
    "UniversalAdversarial",
    "UniversalConsistency",
    "Weight",
    "create",
    "entry",
    "name_of",
    "names",
    "register",
]
