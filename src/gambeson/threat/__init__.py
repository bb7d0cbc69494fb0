"""The threat model: the norm ball of a perturbation, and how many images share it."""

from gambeson.threat.ball import Ball, BoxGradient, Eps, Norm, default_eps, eps_in_norm, perturb

__all__ = ["Ball", "BoxGradient", "Eps", "Norm", "default_eps", "eps_in_norm", "perturb"]
