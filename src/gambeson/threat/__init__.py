"""The threat model: the norm ball of a perturbation and how many images share it, or a patch and where it may lie."""

from gambeson.threat.ball import Ball, BoxGradient, Eps, Norm, default_eps, eps_in_norm, landed, norm_of_ones, perturb
from gambeson.threat.patch import Patch, Placement

__all__ = [
    "Ball",
    "BoxGradient",
    "Eps",
    "Norm",
    "Patch",
    "Placement",
    "default_eps",
    "eps_in_norm",
    "landed",
    "norm_of_ones",
    "perturb",
]
