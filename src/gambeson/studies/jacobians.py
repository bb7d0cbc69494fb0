"""The Jacobian analysis as a measurement of a study: what inputs share of their Jacobians, and how large they are."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import Field

from gambeson.analysis import PairMetric, jacobian_norms, pair_sharing, sharing_factor, stacked_spectrum
from gambeson.studies.measures import Measure, Measured, TrainedModel, Value


class JacobianMeasure(Measure):
    """Mean pair metrics, sharing factor, mean norm, and top singular value of the margin-weighted stack."""

    kind: Literal["jacobian"] = "jacobian"
    test_images: Annotated[int, Field(ge=2)] = 500
    """Test images, a stratified sample."""
    pairs: Annotated[int, Field(ge=1)] = 1000
    """Random pairs of them."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Take the Jacobians."""
        few = trained.data.test.sample(self.test_images, seed=trained.seed)
        found = {
            "sharing": sharing_factor(trained.model, few),
            "jacobian": jacobian_norms(trained.model, few).frobenius.mean,
            "weighted_sigma": math.sqrt(float(stacked_spectrum(trained.model, few, weighting="margin").values[0])),
        }
        pairs = pair_sharing(trained.model, few, pairs=self.pairs, seed=trained.seed)
        for metric in get_args(PairMetric):
            if (spread := pairs.spread(metric)) is not None:
                found[metric] = spread.mean
        return Measured(metrics={name: Value(value=value) for name, value in found.items()})
