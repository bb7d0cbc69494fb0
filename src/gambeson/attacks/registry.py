"""Attacks by name: those that perturb image by image, and those that make one perturbation for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from gambeson.attacks.auto_pgd import AutoPGD, TargetedAutoPGD
from gambeson.attacks.bounded_logit import BoundedLogit
from gambeson.attacks.carlini_wagner import CarliniWagner
from gambeson.attacks.data_free import DataFree
from gambeson.attacks.deepfool import DeepFool
from gambeson.attacks.deepfool_uap import DeepFoolUAP
from gambeson.attacks.few_pixel import FewPixel
from gambeson.attacks.gradient import FGSM, IFGSM, PGD, RFGSM
from gambeson.attacks.l1_auto_pgd import L1AutoPGD
from gambeson.attacks.least_likely import IterLL, RStepLL, StepLL
from gambeson.attacks.nes import NES, SPSA
from gambeson.attacks.procedural import GaborNoise, PerlinNoise
from gambeson.attacks.random_search import RandomSearch
from gambeson.attacks.sga import SGA
from gambeson.attacks.singular_vector import SingularVector
from gambeson.attacks.square import Square
from gambeson.attacks.transfer import TRANSFER, transfer_attack
from gambeson.attacks.universal import StochasticPGD
from gambeson.base import unknown_name

_IMAGE: dict[str, Callable[..., Any]] = {
    "fgsm": FGSM,
    "r-fgsm": RFGSM,
    "i-fgsm": IFGSM,
    "step-ll": StepLL,
    "r-step-ll": RStepLL,
    "iter-ll": IterLL,
    "pgd": PGD,
    "auto-pgd": AutoPGD,
    "auto-pgd-targeted": TargetedAutoPGD,
    "l1-auto-pgd": L1AutoPGD,
    **{name: partial(transfer_attack, name) for name in TRANSFER},
    "deepfool": DeepFool,
    "carlini-wagner": CarliniWagner,
    "square": Square,
    "few-pixel": FewPixel,
    "nes": NES,
    "spsa": SPSA,
    "random-search": RandomSearch,
}
_UNIVERSAL: dict[str, Callable[..., Any]] = {
    "stochastic-pgd": StochasticPGD,
    "sga": SGA,
    "bounded-logit": BoundedLogit,
    "deepfool-uap": DeepFoolUAP,
    "singular-vector": SingularVector,
    "data-free": DataFree,
    "perlin": PerlinNoise,
    "gabor": GaborNoise,
}


def names(kind: Literal["image", "universal"]) -> list[str]:
    """Every name of a kind that :func:`create` takes."""
    return list(_IMAGE if kind == "image" else _UNIVERSAL)


def create(name: str, **settings: Any) -> Any:
    """Build an attack by name, for example ``create("pgd", eps="8/255")``.

    Raises:
        UserError: no such attack, or a setting that is unknown or out of range.
    """
    known = _IMAGE | _UNIVERSAL
    if name not in known:
        raise unknown_name("attack", name, known)
    return known[name](**settings)
