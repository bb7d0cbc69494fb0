"""What a model's slopes say: Jacobians and their bounds, sharing, and signs of hidden gradients.

Every function takes a module or a victim; those over a set take a split, a dataset (its test split) or a pair
(images, labels). The model is frozen and in evaluation mode meanwhile, and is never answered for by a fast copy.
"""

from gambeson.analysis.bounds import BoundRow, BoundTable, bound_table, strongest_signs
from gambeson.analysis.correlation import Correlation, Interval, correlate, partial, pearson, spearman
from gambeson.analysis.ensemble import UniversalAlignment, diversity_gain, universal_alignment
from gambeson.analysis.estimate import Estimate, estimate_frobenius
from gambeson.analysis.gradients import GradientStatistics, gradient_statistics
from gambeson.analysis.jacobian import JacobianNorms, Spread, batch_jacobian, frobenius, jacobian_norms, spectral
from gambeson.analysis.linear import Linear, linearise
from gambeson.analysis.power import StackedNorm, stacked_norm
from gambeson.analysis.sharing import (
    GradientSharing,
    PairMetric,
    PairSharing,
    gradient_sharing,
    pair_metrics,
    pair_sharing,
    sharing_factor,
)
from gambeson.analysis.spectrum import Spectrum, Weighting
from gambeson.analysis.stacked import StackedGram, stacked_gram, stacked_spectrum
from gambeson.analysis.subspace import Subspace, adversarial_subspace, hadamard
from gambeson.analysis.surface import Surface, loss_surface
from gambeson.analysis.views import Source

__all__ = [
    "BoundRow",
    "BoundTable",
    "Correlation",
    "Estimate",
    "GradientSharing",
    "GradientStatistics",
    "Interval",
    "JacobianNorms",
    "Linear",
    "PairMetric",
    "PairSharing",
    "Source",
    "Spectrum",
    "Spread",
    "StackedGram",
    "StackedNorm",
    "Subspace",
    "Surface",
    "UniversalAlignment",
    "Weighting",
    "adversarial_subspace",
    "batch_jacobian",
    "bound_table",
    "correlate",
    "diversity_gain",
    "estimate_frobenius",
    "frobenius",
    "gradient_sharing",
    "gradient_statistics",
    "hadamard",
    "jacobian_norms",
    "linearise",
    "loss_surface",
    "pair_metrics",
    "pair_sharing",
    "partial",
    "pearson",
    "sharing_factor",
    "spearman",
    "spectral",
    "stacked_gram",
    "stacked_norm",
    "stacked_spectrum",
    "strongest_signs",
    "universal_alignment",
]
