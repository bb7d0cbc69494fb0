"""Jacobian analysis: Jacobians and bounds, sharing metrics, gradient masking, loss surfaces and subspaces.

Every function takes a module or a victim; those over a set take a split, a dataset (its test split) or a pair
(images, labels). The model is frozen, in evaluation mode, and used itself, not as a fast copy.
"""

from gambeson.analysis.bounds import BoundRow, BoundTable, Linear, bound_table, linearise, strongest_signs
from gambeson.analysis.certified import CertifiedAccuracy, certified_accuracy
from gambeson.analysis.correlation import Correlation, Interval, correlate, partial, pearson, spearman
from gambeson.analysis.estimate import Estimate, estimate_frobenius
from gambeson.analysis.gradient_masking import GradientStatistics, Surface, gradient_statistics, loss_surface
from gambeson.analysis.jacobian import JacobianNorms, Spread, batch_jacobian, frobenius, jacobian_norms, spectral
from gambeson.analysis.sharing import (
    GradientSharing,
    PairMetric,
    PairSharing,
    UniversalAlignment,
    diversity_gain,
    gradient_sharing,
    pair_metrics,
    pair_sharing,
    sharing_factor,
    universal_alignment,
)
from gambeson.analysis.stacked import (
    Spectrum,
    StackedGram,
    StackedNorm,
    Weighting,
    stacked_gram,
    stacked_norm,
    stacked_spectrum,
)
from gambeson.analysis.subspace import Subspace, adversarial_subspace, hadamard
from gambeson.victim import Source

__all__ = [
    "BoundRow",
    "BoundTable",
    "CertifiedAccuracy",
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
    "certified_accuracy",
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
