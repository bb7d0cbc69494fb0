"""Bootstrap intervals over images for the eps at which the error under attack reaches a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gambeson.base import generator
from gambeson.data import Split

RESAMPLES = 1000
"""Bootstrap samples of the test images (ours)."""
_COUNTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class ImageErrors:
    """Errors per image under one attack; a label map has many predictions per image."""

    wrong: torch.Tensor
    """(N,): predictions that differ from the label."""
    answers: torch.Tensor
    """(N,): predictions that count; 1 for an image with one label, 0 if that is the ignore index."""

    @classmethod
    def of(cls, predictions: torch.Tensor, split: Split) -> ImageErrors:
        """Count them, from predictions (N,) or (N, H, W) on the CPU."""
        counts = split.task.counts(predictions, split.labels.cpu())
        return cls(counts.total - counts.right, counts.total)

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return int(self.wrong.sum()) / max(1, int(self.answers.sum()))


def crossing_interval(
    curve: Mapping[float, ImageErrors], delta: float, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float | None]:
    """95 % interval of the eps at which the error reaches ``delta``: percentile bootstrap over images (Efron 1979).

    The perturbations of the curve are held fixed, since they were selected without the resampled images. In each
    resample the curve is made monotone (an attack at one eps is valid at every larger one) and is linear between the
    eps tried; the eps at which it crosses ``delta`` is collected.

    Args:
        curve: the errors of the same images by eps; 0 stands for clean images.
        delta: the error to reach.
        seed: of the resamples.
        resamples: number of resamples.

    Returns:
        The 2.5 % and the 97.5 % quantile. If too few resamples reach ``delta``, the upper end is None, or the lower end
        the largest eps.
    """
    radii = sorted(curve)
    wrong = torch.stack([curve[eps].wrong for eps in radii]).double()
    answers = curve[radii[0]].answers.double()
    images, draw, found = len(answers), generator(seed, "bootstrap"), []
    size = max(1, _COUNTS_AT_ONCE // max(1, images))
    for begin in range(0, resamples, size):
        rows = min(size, resamples - begin)
        picks = torch.randint(images, (rows, images), generator=draw)
        counts = torch.zeros(rows, images, dtype=torch.float64).scatter_add_(
            1, picks, torch.ones(rows, images).double()
        )
        errors = (counts @ wrong.T) / (counts @ answers).clamp(min=1)[:, None]
        found.append(crossings(torch.tensor(radii, dtype=torch.float64), errors, delta))
    ordered = torch.cat(found).sort().values
    tail = int(0.025 * resamples)
    low, high = float(ordered[tail]), float(ordered[resamples - 1 - tail])
    return low if math.isfinite(low) else radii[-1], high if math.isfinite(high) else None


def crossings(radii: torch.Tensor, errors: torch.Tensor, delta: float) -> torch.Tensor:
    """Return the eps at which each curve first reaches ``delta``, infinite if it does not.

    Args:
        radii: (M,), ascending.
        errors: (B, M), one curve per row, linear between the radii.
        delta: the error.
    """
    rising = errors.cummax(1).values
    reached = rising >= delta
    at = reached.to(torch.int8).argmax(1)
    before = (at - 1).clamp(min=0)
    rows = torch.arange(len(errors))
    below, above = rising[rows, before], rising[rows, at]
    share = ((delta - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    there = torch.where(at == 0, radii[at], radii[before] + share * (radii[at] - radii[before]))
    return torch.where(reached.any(1), there, torch.inf)
