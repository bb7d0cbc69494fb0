"""Attacks, one file a family. Every gradient attack, for one image or for all of them, is a loop over one solver."""

from gambeson.attacks.auto_pgd import AutoPGD, TargetedAutoPGD
from gambeson.attacks.bounded_logit import BoundedLogit
from gambeson.attacks.carlini_wagner import CarliniWagner
from gambeson.attacks.controls import CONTROLS, MORE_CONTROLS, control
from gambeson.attacks.crafting import UniversalAttack
from gambeson.attacks.data_free import DataFree
from gambeson.attacks.deepfool import DeepFool
from gambeson.attacks.deepfool_uap import DeepFoolUAP
from gambeson.attacks.few_pixel import FewPixel
from gambeson.attacks.gradient import FGSM, IFGSM, PGD, RFGSM
from gambeson.attacks.l1_auto_pgd import L1AutoPGD
from gambeson.attacks.least_likely import IterLL, RStepLL, StepLL
from gambeson.attacks.losses import Loss, LossName, cross_entropy, dlr, margin, targeted_dlr
from gambeson.attacks.nes import NES, SPSA
from gambeson.attacks.per_image import GradientAttack
from gambeson.attacks.perturbation import UniversalPerturbation
from gambeson.attacks.procedural import GaborNoise, PerlinNoise
from gambeson.attacks.query import Queries
from gambeson.attacks.query_attack import QueryAttack
from gambeson.attacks.random_search import RandomSearch
from gambeson.attacks.registry import Name, canonical, create, names, register, require_kind
from gambeson.attacks.sga import SGA
from gambeson.attacks.singular_vector import SingularVector
from gambeson.attacks.solver import Ascent, NotFinite
from gambeson.attacks.sources import Average, Ensemble, Source
from gambeson.attacks.square import Square
from gambeson.attacks.transfer import TRANSFER, mi_fgsm, ni_fgsm, si_ni_fgsm, ti_dim, transfer_attack
from gambeson.attacks.transforms import Diversity, Scales, Smoothing
from gambeson.attacks.universal import ClasswiseStochasticPGD, StochasticPGD
from gambeson.attacks.workshop import Candidate, Workshop

__all__ = [
    "CONTROLS",
    "FGSM",
    "IFGSM",
    "MORE_CONTROLS",
    "NES",
    "PGD",
    "RFGSM",
    "SGA",
    "SPSA",
    "TRANSFER",
    "Ascent",
    "AutoPGD",
    "Average",
    "BoundedLogit",
    "Candidate",
    "CarliniWagner",
    "ClasswiseStochasticPGD",
    "DataFree",
    "DeepFool",
    "DeepFoolUAP",
    "Diversity",
    "Ensemble",
    "FewPixel",
    "GaborNoise",
    "GradientAttack",
    "IterLL",
    "L1AutoPGD",
    "Loss",
    "LossName",
    "Name",
    "NotFinite",
    "PerlinNoise",
    "Queries",
    "QueryAttack",
    "RStepLL",
    "RandomSearch",
    "Scales",
    "SingularVector",
    "Smoothing",
    "Source",
    "Square",
    "StepLL",
    "StochasticPGD",
    "TargetedAutoPGD",
    "UniversalAttack",
    "UniversalPerturbation",
    "Workshop",
    "canonical",
    "control",
    "create",
    "cross_entropy",
    "dlr",
    "margin",
    "mi_fgsm",
    "names",
    "ni_fgsm",
    "register",
    "require_kind",
    "si_ni_fgsm",
    "targeted_dlr",
    "ti_dim",
    "transfer_attack",
]
