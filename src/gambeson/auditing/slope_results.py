"""What an audit's Jacobian analysis found, as data: part of ``result.json``."""

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
from gambeson.evaluation.results import Cost

RANGES: dict[PairMetric, tuple[float, float]] = {"cos_F": (-1, 1), "ratio_s": (0.5, 1), "rank1": (0, 1), "cka": (0, 1)}
"""What values each pair metric can have; the bounds of its histogram, so that models can be compared."""
_BINS = 40


class Bounds(Config):
    """What the linearised model allows one perturbation to do, against what the crafted ones did."""

    eps: list[float]
    """One for every row of the table."""
    table: BoundTable


class PairHistogram(Config):
    """How alike the Jacobians of two images are, for pairs within a class and between two."""

    metric: PairMetric
    """``cos_F`` is the primary one; see :func:`gambeson.analysis.pair_metrics`."""
    within: Spread | None
    between: Spread | None
    edges: list[float]
    """Bounds of the bins, over the metric's own range."""
    within_counts: list[int]
    """Pairs of one class in every bin."""
    between_counts: list[int]
    """Pairs of two classes in every bin."""

    @classmethod
    def of(cls, found: PairSharing, metric: PairMetric) -> PairHistogram:
        """Count one metric's values in bins; pairs with a Jacobian of zero have none."""
        low, high = RANGES[metric]
        value = found.values[metric].double()

        def counts(same: bool) -> list[int]:
            chosen = value[(found.same_class == same) & value.isfinite()]
            return [int(n) for n in torch.histc(chosen.clamp(low, high), _BINS, low, high)]  # rounding may step outside

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
    """Share of images that the model gets wrong, [e1][e2]."""
    singles: list[list[list[float]]]
    """The same loss for the first of them alone, [image][e1][e2]."""
    ridge: Spread
    """How much of the loss's rise along g at its highest is lost again at the far end; 0 where it only rises."""


class Subspace(Config):
    """How many orthogonal directions break the model at an image (GAAS; Tramer et al. 2017, and 2018 section 4.2)."""

    norm: str
    eps: float
    """Length of every direction; in the norm that the audit does not use, that of its usual grid at the same place."""
    orders: list[int]
    """The k directions that were tried at once."""
    shares: list[float]
    """Share of the eligible images of which at least k directions break the model, for every order."""
    eligible: int
    """Images that the model has right and that have a gradient."""
    dead: int
    """Images that it has right but whose gradient is zero."""
    dimension: Spread | None
    """Largest number of breaking directions of an image; None where no image is eligible."""
    cosine: list[float]
    """Largest |cosine| of two directions after the clip to [0, 1], by order; before it they are orthogonal."""


class Slopes(Config):
    """What the model's slopes say, on a sample of test images. Parts that are None are explained in ``left_out``."""

    images: int
    """Test images of the sample; parts that cost more look at some of them, and say at how many."""
    fixed_draw: bool = False
    """The model is random, and every forward here began from one seed."""
    norms: JacobianNorms | None = None
    """Exact Frobenius and spectral norms of single images' Jacobians."""
    frobenius: Spread | None = None
    """Estimated Frobenius norms, where exact ones cost too much."""
    gradients: GradientStatistics | None = None
    gradient_sharing: GradientSharing | None = None
    sharing: float | None = None
    """The sharing factor: 1 where all images share one worst direction, 1/n where theirs are orthogonal."""
    bounds: Bounds | None = None
    pairs: list[PairHistogram] = Field(default_factory=list)
    surface: LossSurface | None = None
    subspaces: list[Subspace] = Field(default_factory=list)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Parts that were not measured, with the reason."""
    file: str = ""
    """File with the tensors: ``direction``, the best shared L2 direction of the linearised model, (C, H, W);
    ``surface`` and ``wrong``, each image's, (N, S, S); ``pairs`` with their metrics."""
    cost: Cost
