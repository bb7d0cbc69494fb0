"""What an attacker may do: the ball a perturbation must stay in, and which images share it."""

from gambeson.threat.ball import Ball, BoxGradient, Eps, Norm, perturb

__all__ = ["Ball", "BoxGradient", "Eps", "Norm", "perturb"]
