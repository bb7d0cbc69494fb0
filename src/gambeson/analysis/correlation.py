"""Correlations of a metric with robustness over models, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from gambeson.base import Config, UserError, generator


class Interval(Config):
    """A correlation over models with its 95 % percentile bootstrap interval (Efron 1979), models redrawn."""

    value: float
    low: float
    high: float


class Correlation(Config):
    """Correlations of a metric with measured robustness."""

    pearson: Interval
    """Correlation of the values."""
    spearman: Interval
    """Rank correlation, with mean ranks for ties."""
    partial: Interval | None
    """Partial rank correlation given the control. None without a control, or if the control explains one side
    completely."""
    models: int
    draws: int
    """Valid bootstrap draws: those in which nothing is constant."""


def pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of two tensors (..., N) along the last dimension; NaN where one is constant."""
    a, b = (side - side.mean(-1, keepdim=True) for side in (a.double(), b.double()))
    spread = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    flat = (a.abs().amax(-1) < 1e-12) | (b.abs().amax(-1) < 1e-12)
    return ((a * b).sum(-1) / spread).clamp(-1, 1).masked_fill(flat, math.nan)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the ranks along the last dimension, from 1; equal values share their mean rank."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.cpu().numpy(), axis=-1)).to(values.device)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the rank correlation along the last dimension (Spearman 1904), as :func:`pearson` of the ranks."""
    return pearson(ranks(a), ranks(b))


def partial(a: torch.Tensor, b: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    """Return the partial rank correlation of a and b given the control, along the last dimension of three (..., N).

    (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2) (1 - r_bc^2)). NaN where one of the three is constant, or the control ranks a
    side alike.
    """
    ab, ac, bc = spearman(a, b), spearman(a, control), spearman(b, control)
    left = (1 - ac**2) * (1 - bc**2)
    return ((ab - ac * bc) / left.clamp(min=1e-300).sqrt()).clamp(-1, 1).masked_fill(left < 1e-12, math.nan)


def correlate(
    metric: Sequence[float],
    robustness: Sequence[float],
    control: Sequence[float] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Correlate a metric with measured robustness over models, one value per model.

    Args:
        metric: such as each model's mean pair metric.
        robustness: such as each model's UER at one eps.
        control: a confounder, such as the log of the mean ||J||_F, which the regularisation strength changes together
            with the alignment.
        draws: bootstrap draws over models; default ours.
        seed: of the bootstrap.

    Raises:
        UserError: fewer than 4 models, different lengths, values that are not finite, or a constant side.
    """
    columns = [metric, robustness] + ([] if control is None else [control])
    if len({len(column) for column in columns}) > 1 or len(metric) < 4:
        raise UserError(
            f"columns of {', '.join(str(len(column)) for column in columns)} values: expected as many of each, one a "
            "model, and 4 models or more"
        )
    table = torch.tensor([list(column) for column in columns], dtype=torch.float64)
    if not bool(table.isfinite().all()):
        raise UserError("some values are NaN or infinite: leave those models out")
    if bool((table[:2].amin(1) == table[:2].amax(1)).any()):
        raise UserError("the metric or the robustness is the same for every model: there is no correlation")
    picks = torch.randint(table.shape[1], (draws, table.shape[1]), generator=generator(seed, "bootstrap"))
    again = table[:, picks]  # (columns, draws, models)
    usable = ((again.amin(2) < again.amax(2))[:2]).all(0)
    again = again[:, usable]

    def interval(measure: Callable[..., torch.Tensor], count: int) -> Interval | None:
        value = float(measure(*table[:count]))
        drawn = measure(*again[:count])
        drawn = drawn[drawn.isfinite()]
        if math.isnan(value) or len(drawn) == 0:
            return None
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(value=value, low=low, high=high)

    straight, ranked = interval(pearson, 2), interval(spearman, 2)
    assert straight is not None
    assert ranked is not None
    return Correlation(
        pearson=straight,
        spearman=ranked,
        partial=None if control is None else interval(partial, 3),
        models=table.shape[1],
        draws=int(usable.sum()),
    )
