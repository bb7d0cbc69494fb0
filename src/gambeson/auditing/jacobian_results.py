"""The results of the Jacobian analysis of an audit, as stored in ``result.json``."""

from __future__ import annotations

import torch
from pydantic import Field

from gambeson.analysis import (
    BoundTable,
    GradientSharing,
    GradientStatistics,
    JacobianNorms,
    PairMetric,
    PairSharing,
    Spread,
)
from gambeson.base import Config
from gambeson.evaluation.rates import Cost

RANGES: dict[PairMetric, tuple[float, float]] = {"cos_F": (-1, 1), "ratio_s": (0.5, 1), "rank1": (0, 1), "cka": (0, 1)}
"""Range of each pair metric, and of its histogram, so that models can be compared."""
_BINS = 40


class Bounds(Config):
    """Bounds for the linearised model, with the measured effects of the crafted perturbations."""

    eps: list[float]
    """One per row of the table."""
    table: BoundTable


class PairHistogram(Config):
    """Histogram of a pair metric of Jacobians, for pairs within a class and between two."""

    metric: PairMetric
    """``cos_F`` is the primary one; see :func:`gambeson.analysis.pair_metrics`."""
    within: Spread | None
    between: Spread | None
    edges: list[float]
    """Edges of the bins, over the metric's range."""
    within_counts: list[int]
    """Pairs within a class per bin."""
    between_counts: list[int]
    """Pairs between two classes per bin."""

    @classmethod
    def of(cls, found: PairSharing, metric: PairMetric) -> PairHistogram:
        """Count one metric's values in bins, without pairs with a zero Jacobian."""
        low, high = RANGES[metric]
        value = found.values[metric].double()

        def counts(same: bool) -> list[int]:
            chosen = value[(found.same_class == same) & value.isfinite()]
            return [int(n) for n in torch.histc(chosen.clamp(low, high), _BINS, low, high)]  # against rounding

        return cls(
            metric=metric,
            within=found.spread(metric, True),
            between=found.spread(metric, False),
            edges=[low + (high - low) * k / _BINS for k in range(_BINS + 1)],
            within_counts=counts(True),
            between_counts=counts(False),
        )


class LossSurface(Config):
    """Cross-entropy on x + e1 g + e2 g_perp, g the sign of the gradient and g_perp random signs orthogonal to it."""

    images: int
    """A subset of the sample."""
    steps: list[float]
    """Values of e1 and of e2, in pixel units."""
    loss: list[list[float]]
    """Mean over the images, [e1][e2]."""
    wrong: list[list[float]]
    """Error rate, [e1][e2]."""
    singles: list[list[list[float]]]
    """The loss of the first images, [image][e1][e2]."""
    ridge: Spread
    """Decrease of the loss along g from its maximum to the far end; 0 if it only increases."""


class Subspace(Config):
    """Number of orthogonal adversarial directions at an image (GAAS; Tramer et al. 2017, and 2018 section 4.2)."""

    norm: str
    eps: float
    """Length of every direction; for the norm that the audit does not use, the corresponding value of its default
    grid."""
    orders: list[int]
    """The values of k."""
    shares: list[float]
    """Share of eligible images with at least k adversarial directions, for every k."""
    eligible: int
    """Correctly classified images with a non-zero gradient."""
    dead: int
    """Correctly classified images with zero gradient."""
    dimension: Spread | None
    """Largest number of adversarial directions of an image; None if no image is eligible."""
    cosine: list[float]
    """Largest |cosine| of two directions after the clip to [0, 1], by k; before clipping they are orthogonal."""


class JacobianResult(Config):
    """The Jacobian analysis, on a sample of test images. Parts that are None are explained in ``left_out``."""

    images: int
    """Test images of the sample; more expensive parts use fewer, and record how many."""
    fixed_draw: bool = False
    """Whether the model is random; every forward then used one seed."""
    norms: JacobianNorms | None = None
    """Exact Frobenius and spectral norms per image."""
    frobenius: Spread | None = None
    """Estimated Frobenius norms, if exact ones are too expensive."""
    gradients: GradientStatistics | None = None
    gradient_sharing: GradientSharing | None = None
    sharing: float | None = None
    """The sharing factor: 1 if all images share one worst direction, 1/n if theirs are orthogonal."""
    bounds: Bounds | None = None
    pairs: list[PairHistogram] = Field(default_factory=list)
    surface: LossSurface | None = None
    subspaces: list[Subspace] = Field(default_factory=list)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Parts not measured, with reasons."""
    file: str = ""
    """File with the tensors: ``direction``, the best shared L2 direction of the linearised model, (C, H, W);
    ``surface`` and ``wrong``, each image's, (N, S, S); ``pairs`` with their metrics."""
    cost: Cost
