"""The top of a stacked Jacobian's spectrum, however it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Weighting = Literal["none", "margin"]
"""``margin``: the rows of J_i are divided by the margin m_i, and images already wrong are left out (P4)."""


@dataclass(frozen=True)
class Spectrum:
    """The top of G = sum_i J_i^T J_i (over the stack's images), the square of the stacked Jacobian's."""

    values: torch.Tensor
    """(k,) float64, largest first: squared singular values sigma^2 of the stack, in squared logits per pixel unit."""
    residuals: torch.Tensor
    """(k,): an eigenvalue of G lies at most this far from each value."""
    directions: torch.Tensor
    """(k, C, H, W), unit L2 length. The first is the best universal L2 perturbation of the linearised model, up to
    its sign, which the linearised effect does not see."""
    trace: float
    """tr G = sum_i ||J_i||_F^2, the images' rows weighted as ``weighting`` says."""
    trace_error: float
    """Standard error of the trace; 0 where it is exact."""
    shared: float | None
    """The sharing factor rho = sigma_1^2 / sum_i ||J_i||_2^2 in [1/N, 1]: 1 is one worst direction for all images,
    1/N is N orthogonal ones. None where single spectral norms were not computed."""
    images: int
    """Images of the set."""
    left_out: int
    """Images already wrong, which a margin-weighted stack leaves out."""
    weighting: Weighting
    method: Literal["gram", "rows", "products"]

    @property
    def ceiling(self) -> float:
        """The largest value plus its residual: what bounds are computed from, so that an early stop is covered."""
        return float(self.values[0] + self.residuals[0]) if len(self.values) else 0.0


def weights(margin: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """Return what the rows of each image's Jacobian are multiplied with, (B,); 0 leaves an image out."""
    if weighting == "none":
        return torch.ones_like(margin)
    return torch.where(margin > 0, 1 / margin, torch.zeros_like(margin))
