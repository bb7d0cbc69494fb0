"""Defences, one file a paper: the objective that training minimises."""

from gambeson.defenses.adp import ADP
from gambeson.defenses.combination import Combination
from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial
from gambeson.defenses.gal import GAL
from gambeson.defenses.jacobian import Jacobian
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.defenses.jacobian_norm import JacobianNorm
from gambeson.defenses.learn2perturb import Learn2Perturb
from gambeson.defenses.objective import Defense, Follows, Losses, Objective, Scene, Weight
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.defenses.pni import PNI
from gambeson.defenses.registry import AnyDefense, create, name_of, names, needs_eps, register
from gambeson.defenses.rse import RSE
from gambeson.defenses.shared_adversarial import SharedAdversarial
from gambeson.defenses.standard import Standard
from gambeson.defenses.terms import Adversarial, Batch, Clean, Term
from gambeson.defenses.trades import Trades
from gambeson.defenses.trs import TRS
from gambeson.defenses.universal_adversarial import UniversalAdversarial
from gambeson.defenses.universal_consistency import UniversalConsistency
from gambeson.defenses.voters import Ensemble

__all__ = [
    "ADP",
    "GAL",
    "PNI",
    "RSE",
    "TRS",
    "Adversarial",
    "AnyDefense",
    "Batch",
    "Clean",
    "Combination",
    "Defense",
    "Ensemble",
    "EnsembleAdversarial",
    "Follows",
    "Jacobian",
    "JacobianEnsemble",
    "JacobianNorm",
    "Learn2Perturb",
    "Losses",
    "Objective",
    "PGDAdversarial",
    "Scene",
    "SharedAdversarial",
    "Standard",
    "Term",
    "Trades",
    "UniversalAdversarial",
    "UniversalConsistency",
    "Weight",
    "create",
    "name_of",
    "names",
    "needs_eps",
    "register",
]
