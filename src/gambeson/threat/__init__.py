"""What an attacker may do: the ball a perturbation must stay in, and which images share it."""

from gambeson.threat.ball import Ball, Eps, Norm
from gambeson.threat.sharing import BoxGradient, perturb

__all__ = ["Ball", "BoxGradient", "Eps", "Norm", "perturb"]
