"""Bayesian optimisation on the unit cube: a Gaussian process and expected improvement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

SCALES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 2.0)
"""Candidate length scales of the kernel, in edges of the cube."""
NOISES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate noise variances, as shares of the signal's."""
_ROUNDS, _RANDOM, _NEAR = 3, 1000, 200


@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """A Gaussian process with a Matern 5/2 kernel, conditioned on observations (Rasmussen and Williams 2006, ch. 2).

    Computed in float64. Values are standardised internally; :meth:`at` returns the original units.
    """

    points: torch.Tensor
    """(n, d), the observed points."""
    scales: torch.Tensor
    """(d,), length scale of each axis."""
    factor: torch.Tensor
    """(n, n), lower Cholesky factor of the kernel matrix with noise, for a signal of variance one."""
    weights: torch.Tensor
    """(n, 1), the inverse of that matrix times the standardised values."""
    signal: float
    """Signal variance of highest likelihood, in standardised units."""
    centre: float
    """Mean of the values."""
    unit: float
    """Their standard deviation; one if they are all equal."""

    @classmethod
    def fitted(cls, points: torch.Tensor, values: torch.Tensor) -> GaussianProcess:
        """Choose length scales and noise by the marginal likelihood, and condition on the values.

        One length scale for all axes is chosen first, together with the noise, among :data:`SCALES` and
        :data:`NOISES`; then that of each axis in turn, twice.

        Args:
            points: (n, d) in the unit cube.
            values: (n,), finite.
        """
        points, values = points.double(), values.double()
        centre, unit = float(values.mean()), float(values.std(correction=0))
        unit = unit if unit > 1e-12 else 1.0
        target = ((values - centre) / unit).unsqueeze(1)
        grid = torch.cartesian_prod(torch.tensor(SCALES), torch.tensor(NOISES)).double()
        best = int(_likelihood(points, target, grid[:, :1].expand(-1, points.shape[1]), grid[:, 1]).argmax())
        scales, noise = grid[best, 0].repeat(points.shape[1]), grid[best, 1]
        for axis in [*range(points.shape[1])] * 2:
            tried = scales.repeat(len(SCALES), 1)
            tried[:, axis] = torch.tensor(SCALES, dtype=torch.float64)
            scales = tried[int(_likelihood(points, target, tried, noise.repeat(len(SCALES))).argmax())]
        factor = _factors(points, scales[None], noise[None])[0]
        weights = torch.cholesky_solve(target, factor)
        signal = max(float((target * weights).mean()), 1e-12)
        return cls(
            points=points, scales=scales, factor=factor, weights=weights, signal=signal, centre=centre, unit=unit
        )

    def at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, (m,) each, of the function without its noise at ``places`` (m, d)."""
        cross = matern(places.double() / self.scales, self.points / self.scales)
        mean = (cross @ self.weights).squeeze(1)
        explained = torch.linalg.solve_triangular(self.factor, cross.T, upper=False).square().sum(0)
        deviation = (self.signal * (1 - explained).clamp(min=0)).sqrt()
        return self.centre + self.unit * mean, self.unit * deviation


def matern(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the Matern 5/2 kernel (..., n, m) of (..., n, d) and (..., m, d), already over the length scales."""
    # Differences are squared directly: the faster product form loses small distances.
    far = (one.unsqueeze(-2) - other.unsqueeze(-3)).square().sum(-1).mul(5).sqrt()
    return (1 + far + far.square() / 3) * torch.exp(-far)


def _factors(points: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    spread = points / scales.unsqueeze(1)
    kernel = matern(spread, spread)
    own = torch.eye(len(points), dtype=torch.float64)
    return torch.linalg.cholesky(kernel + noise.view(-1, 1, 1) * own)


def _likelihood(points: torch.Tensor, target: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the log marginal likelihood (s,), less a constant, at the best signal variance."""
    factors = _factors(points, scales, noise)
    fit = torch.linalg.solve_triangular(factors, target.expand(len(factors), -1, -1), upper=False).square().sum((1, 2))
    volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    return -volume - len(points) / 2 * (fit / len(points)).clamp(min=1e-12).log()


def expected_improvement(mean: torch.Tensor, deviation: torch.Tensor, best: float) -> torch.Tensor:
    """Return E[max(0, f - best)] of Gaussians f (Jones et al. 1998, equation 15, for a maximum)."""
    gain = mean - best
    z = gain / deviation.clamp(min=1e-12)
    bell = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(deviation > 0, gain * torch.special.ndtr(z) + deviation * bell, gain.clamp(min=0))


def propose(points: torch.Tensor, values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return the point of the unit cube (d,) with the highest expected improvement.

    Observations may be noisy, so improvement is relative to the highest mean at an observed point. The maximum is
    searched among random points, then three times near the best ones.

    Args:
        points: (n, d), observed so far, with n >= 1.
        values: (n,), the observed values; higher is better.
        draw: generator of the candidate points, on the CPU.
    """
    process = GaussianProcess.fitted(points, values)
    best = float(process.at(process.points)[0].max())
    size = points.shape[1]
    places = torch.rand(_RANDOM, size, generator=draw, dtype=torch.float64)
    leader = process.points[int(values.argmax())]
    width = 0.1
    places = torch.cat([places, _near(leader, width, draw)])
    for _ in range(_ROUNDS):
        merit = expected_improvement(*process.at(places), best)
        top = places[merit.topk(5).indices]
        places = torch.cat([top, *[_near(place, width, draw) for place in top]])
        width /= 4
    return places[int(expected_improvement(*process.at(places), best).argmax())]


def _near(place: torch.Tensor, width: float, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(_NEAR // 5, len(place), generator=draw, dtype=torch.float64)
    return (place + width * noise).clamp(0, 1)


def latin_hypercube(count: int, size: int, draw: torch.Generator) -> torch.Tensor:
    """Return ``count`` points (count, size) of the unit cube, one in each of ``count`` slices of every axis."""
    slices = torch.stack([torch.randperm(count, generator=draw) for _ in range(size)], 1)
    return (slices + torch.rand(count, size, generator=draw, dtype=torch.float64)) / count


def first_points(budget: int, size: int) -> int:
    """Return how many of ``budget`` points are spread over the cube before the process is used (ours)."""
    return max(1, min(2 * size + 2, budget // 2))


def maximise(
    function: Callable[[torch.Tensor], float], size: int, budget: int, draw: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Maximise a function on the unit cube with exactly ``budget`` evaluations; return the best point and its value.

    Args:
        function: of a point (size,), float64.
        size: number of axes.
        budget: evaluations, at least 1.
        draw: generator of every random number, on the CPU.
    """
    points = latin_hypercube(first_points(budget, size), size, draw)
    values = torch.tensor([function(point) for point in points], dtype=torch.float64)
    for _ in range(budget - len(points)):
        point = propose(points, values, draw)
        points = torch.cat([points, point[None]])
        values = torch.cat([values, torch.tensor([function(point)], dtype=torch.float64)])
    best = int(values.argmax())
    return points[best], float(values[best])
