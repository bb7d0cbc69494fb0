"""Attacks, one file per family. Every gradient attack, per-image or universal, is a loop over one solver."""

from gambeson.attacks.gradient.auto_pgd import AutoPGD, L1AutoPGD, TargetedAutoPGD
from gambeson.attacks.gradient.base import GradientAttack
from gambeson.attacks.gradient.pgd import (
    FGSM,
    IFGSM,
    PGD,
    RFGSM,
    TRANSFER,
    IterLL,
    RStepLL,
    StepLL,
    mi_fgsm,
    ni_fgsm,
    si_ni_fgsm,
    ti_dim,
    transfer_attack,
)
from gambeson.attacks.gradient.segmentation import SEA, CosPGD, SegPGD
from gambeson.attacks.gradient.transfer import Diversity, Noise, Scales, Smoothing
from gambeson.attacks.losses import Loss, LossName, cosine, cross_entropy, dlr, js, margin, targeted_dlr
from gambeson.attacks.minimal_norm.carlini_wagner import CarliniWagner
from gambeson.attacks.minimal_norm.deepfool import DeepFool
from gambeson.attacks.query.base import Queries, QueryAttack
from gambeson.attacks.query.nes import NES, SPSA
from gambeson.attacks.query.one_pixel import OnePixel
from gambeson.attacks.query.rays import RayS
from gambeson.attacks.query.square import RandomSearch, Square
from gambeson.attacks.registry import (
    Name,
    canonical,
    create,
    entry,
    name_of,
    names,
    register,
    require_attack,
    require_kind,
)
from gambeson.attacks.solver import NonFiniteGradientError, ProjectedGradient
from gambeson.attacks.universal.adversarial_patch import AdversarialPatch, load
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.controls import CONTROLS, MORE_CONTROLS, PATCH_CONTROLS, control, patch_control
from gambeson.attacks.universal.data_free import DataFree
from gambeson.attacks.universal.deepfool_uap import DeepFoolUAP
from gambeson.attacks.universal.df_uap import DFUAP
from gambeson.attacks.universal.nes import UniversalNES
from gambeson.attacks.universal.patch import UniversalPatch
from gambeson.attacks.universal.perturbation import UniversalPerturbation
from gambeson.attacks.universal.procedural import GaborNoise, PerlinNoise
from gambeson.attacks.universal.sga import SGA
from gambeson.attacks.universal.singular_vector import SingularVector
from gambeson.attacks.universal.stochastic_pgd import ClasswiseStochasticPGD, StochasticPGD
from gambeson.attacks.universal.target import Target
from gambeson.victim import Average, ModelAverage, Source

__all__ = [
    "CONTROLS",
    "DFUAP",
    "FGSM",
    "IFGSM",
    "MORE_CONTROLS",
    "NES",
    "PATCH_CONTROLS",
    "PGD",
    "RFGSM",
    "SEA",
    "SGA",
    "SPSA",
    "TRANSFER",
    "AdversarialPatch",
    "AutoPGD",
    "Average",
    "Candidate",
    "CarliniWagner",
    "ClasswiseStochasticPGD",
    "CosPGD",
    "CraftingContext",
    "DataFree",
    "DeepFool",
    "DeepFoolUAP",
    "Diversity",
    "GaborNoise",
    "GradientAttack",
    "IterLL",
    "L1AutoPGD",
    "Loss",
    "LossName",
    "ModelAverage",
    "Name",
    "Noise",
    "NonFiniteGradientError",
    "OnePixel",
    "PerlinNoise",
    "ProjectedGradient",
    "Queries",
    "QueryAttack",
    "RStepLL",
    "RandomSearch",
    "RayS",
    "Scales",
    "SegPGD",
    "SingularVector",
    "Smoothing",
    "Source",
    "Square",
    "StepLL",
    "StochasticPGD",
    "Target",
    "TargetedAutoPGD",
    "UniversalAttack",
    "UniversalNES",
    "UniversalPatch",
    "UniversalPerturbation",
    "canonical",
    "control",
    "cosine",
    "create",
    "cross_entropy",
    "dlr",
    "entry",
    "js",
    "load",
    "margin",
    "mi_fgsm",
    "name_of",
    "names",
    "ni_fgsm",
    "patch_control",
    "register",
    "require_attack",
    "require_kind",
    "si_ni_fgsm",
    "targeted_dlr",
    "ti_dim",
    "transfer_attack",
]
