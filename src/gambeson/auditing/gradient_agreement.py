"""Whether a gradient is that of the function in every direction, and not only along itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gambeson.attacks import Loss
from gambeson.base import derive, generator, seeded
from gambeson.data import Split
from gambeson.threat import Ball, Norm, norm_of_ones, perturb
from gambeson.victim import Victim, auto_batch_size

_SMALLEST, _LARGEST, _STEPS = 2.5e-4, 0.25, 4
_DIRECTIONS = 6
"""Of each kind, per image. A gradient that lacks a part of the true one misses its share on every direction, and an
honest one misses nothing on any: few tell them apart."""
_ENOUGH = 0.97
"""Agreement at which no other step is tried."""
_MATTERS = 0.25
"""Share of a perturbation's effect below which what a kind of direction finds does not matter."""
_LITTLE = 0.1
"""Share of noise in the step along the gradient's signs."""
_CALLS = 3
_QUIET = 0.05
"""Share of a random model's images that may still disagree when no other step is tried."""


@dataclass(frozen=True)
class GradientAgreement:
    """What :func:`gradient_agreement` measured, image by image."""

    agreement: torch.Tensor
    """(N,), the least cosine over points, kinds and functions, in [-1, 1]; NaN where noise that no seed fixes is larger
    than all that the steps change."""
    smooth: torch.Tensor
    """(N,), whether the differences over two steps agree with each other: then the function has a slope there, and a
    gradient that disagrees is another function's. Of rounded functions neither is known."""


@torch.no_grad()
def gradient_agreement(
    victim: Victim, split: Split, *, eps: float, norm: Norm = "inf", seed: int = 0
) -> GradientAgreement:
    """Return how well the gradient foretells what a model does along directions that have nothing to do with it.

    Along each direction v, of random signs, the slope g . v that the gradient g promises is compared with the central
    difference of the outputs, by the cosine of the two over all directions of a kind: 1 where the gradient is that of
    the function, 0 where it is of no use. The difference along the gradient itself, which is usually checked, hardly
    changes where a part of the gradient is missing. The kinds are: all values of the image; the half of them with the
    smallest gradient, where hidden pixels are; and checkerboards in random cells of two by two pixels, which a
    low-passed gradient does not see. The latter two count only where they find much that an attack could use. The
    function is the margin of the logits and, on all values, a random combination of all classes' logits. Points are
    drawn in the ball, and about a step of eps along the gradient's signs; no two pixels are equal there, as medians and
    maxima have a kink where they are. Of four steps, from 0.00025 to half of eps and a quarter at the most, the one
    that agrees best decides for each image: quantised models are flat below their own resolution, and a difference over
    more than a network's linear region need not be its slope.

    Of a random model both ends of a difference have the same draw where torch's seed fixes it; what noise remains is
    measured, and taken off the differences.

    Args:
        victim: the model, inside its context.
        split: images.
        eps: radius of the ball.
        norm: of the ball.
        seed: of points and directions.
    """
    found, smooth = [], []
    ball = Ball(eps=eps, norm=norm)
    top = max(1 / 255, eps / norm_of_ones(norm, split.shape) / 2)
    top = min(top, _LARGEST)  # points that far inside the box have room still
    steps = [_SMALLEST * (top / _SMALLEST) ** (k / (_STEPS - 1)) for k in range(_STEPS)]
    for k, (images, labels) in enumerate(split.batches(auto_batch_size(split.shape, 250, 2**21), device=victim.device)):
        draw = generator(seed, "agreement", k, device=images.device)
        probes = _Probes(victim, split, labels, derive(seed, "draw", k), draw)
        start = _inside(perturb(images, ball.uniform(images.shape, draw)), top, draw)
        gradient, _, _ = probes.gradients(start)
        little = _LITTLE * ball.uniform(images.shape, draw)  # or pixels that were equal would be so again
        moved = _inside(perturb(images, (1 - _LITTLE) * ball.project(eps * gradient.sign()) + little), top, draw)
        (here, even), (there, level) = (probes.agreement(points, steps) for points in (start, moved))
        found.append(torch.fmin(here, there).cpu())
        smooth.append(torch.where(there < here, level, even).cpu())  # where the gradient disagrees
    return GradientAgreement(torch.cat(found), torch.cat(smooth))


def _inside(points: torch.Tensor, top: float, draw: torch.Generator) -> torch.Tensor:
    """Return points at least ``top`` inside the box, of which those that lay beyond are spread over as much again."""
    spread = top * torch.rand(points.shape, generator=draw, device=points.device)
    points = torch.where(points < top, top + spread, points)
    return torch.where(points > 1 - top, 1 - top - spread, points)


class _Probes:
    """Differences and gradients of one batch, of a random model all at one draw."""

    def __init__(self, victim: Victim, split: Split, labels: torch.Tensor, seed: int, draw: torch.Generator) -> None:
        self.victim, self.task, self.labels, self.seed, self.draw = victim, split.task, labels, seed, draw
        self.loss = Loss(kind="margin")
        self.random = victim.inspect(split.take(slice(0, 8), victim.device)[0], scores=True).varies
        self.weights: torch.Tensor | None = None

    def values(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The margin, and the combination of all logits, (2, N)."""
        logits = logits.double()  # a masked class has a logit beside which the others' are lost in single precision
        margin = self.loss(logits, self.labels[rows], self.task)
        if logits.ndim != 2:
            return torch.stack([margin, margin])
        if self.weights is None:
            self.weights = torch.rand(logits.shape, generator=self.draw, device=logits.device) * 2 - 1
        return torch.stack([margin, (self.weights[rows] * logits).sum(1)])

    def _ask(self, points: torch.Tensor) -> torch.Tensor:
        with seeded(self.seed, "agreement"):
            return self.victim.forward_original(points)

    def gradients(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of margin and combination, (N, C, H, W), and the variance of both between calls, (2, N)."""
        every = torch.arange(len(points), device=points.device)
        with torch.enable_grad(), seeded(self.seed, "agreement"):
            point = points.detach().clone().requires_grad_()
            values = self.values(self.victim.forward_original(point), every)
            first, second = (
                self.victim.gradient(value.sum(), point, len(point), keep=k == 0).nan_to_num(0, 0, 0)
                for k, value in enumerate(values)
            )
        again = [self.values(self._ask(points), every) for _ in range(_CALLS * self.random)]
        variance = torch.stack([values.detach(), *again]).double().var(0, correction=0) * (len(again) + 1)
        return first, second, variance / max(1, len(again))

    def agreement(self, points: torch.Tensor, steps: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """The agreement of each image by the best of the steps, and whether two steps agree with each other, (N,)."""
        first, second, variance = self.gradients(points)
        best = torch.full((len(points),), math.nan, dtype=torch.float64, device=points.device)
        smooth, rows = torch.zeros_like(best, dtype=torch.bool), torch.arange(len(points), device=points.device)
        before = torch.zeros(0)
        state = self.draw.get_state()
        for step in steps:
            self.draw.set_state(state)  # the same directions
            now, seen = self._at(points[rows], rows, (first[rows], second[rows]), variance[:, rows], step)
            if len(before):
                smooth[rows] |= _cosine(before, seen) >= _ENOUGH
            best[rows] = torch.fmax(best[rows], now)
            left = ~(best[rows] >= _ENOUGH)
            # A random model's rows keep their draws in the whole batch alone.
            left |= self.random and float(left.double().mean()) > _QUIET
            rows, before = rows[left], seen[:, left]
            if not len(rows):
                break
        return best, smooth

    def _at(
        self,
        points: torch.Tensor,
        rows: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor],
        variance: torch.Tensor,
        step: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least agreement over the kinds, (N,), and the margin's derivatives along all values, (directions, N)."""
        least, derivatives = torch.zeros(0), torch.zeros(0)
        size = gradients[0].abs().flatten(1).sum(1).double()
        noise = variance / (2 * step**2)
        for free, directions in self._kinds(gradients[0], rows):
            said, seen = [], []
            for v in directions:
                ends = [self.values(self._ask(points + side * step * v), rows) for side in (1, -1)]
                seen.append((ends[0] - ends[1]).double() / (2 * step))
                said.append(torch.stack([(one * v).double().flatten(1).sum(1) for one in gradients]))
            p, s = torch.stack(said), torch.stack(seen)  # (directions, 2, N)
            energy = s.square().mean(0) - noise
            cosine = (p * s).mean(0) / (p.square().mean(0) * energy.clamp(min=0)).sqrt()
            nothing = (p == 0).all(0) & (s == 0).all(0)
            cosine = torch.where(nothing, 1.0, cosine.nan_to_num(0.0, 0.0, 0.0)).clamp(-1, 1)
            cosine = torch.where(energy < noise / 2, math.nan, cosine)
            if free is None:  # all values
                least, derivatives = cosine.amin(0), s[:, 0]
                continue
            reach = (free * energy[0].clamp(min=0)).sqrt()
            least = torch.where(reach > _MATTERS * (size + reach), torch.fmin(least, cosine[0]), least)
        return least, derivatives

    def _kinds(
        self, gradient: torch.Tensor, rows: torch.Tensor
    ) -> Iterator[tuple[float | None, Iterator[torch.Tensor]]]:
        """The kinds of directions (N, C, H, W), each with its number of free signs; None for all values."""
        half = gradient.abs().flatten(1)
        half = (half <= half.median(1, keepdim=True).values).view_as(gradient)
        yield None, (self._signs(gradient, rows) for _ in range(_DIRECTIONS))
        yield gradient[0].numel() / 2, (self._signs(gradient, rows) * half for _ in range(_DIRECTIONS))
        if min(gradient.shape[-2:]) > 1:
            yield gradient[0].numel() / 4, (self._chequers(gradient, rows) for _ in range(_DIRECTIONS))

    def _signs(self, like: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # Drawn for the whole batch, so that an image keeps its directions whatever other rows are left.
        return Ball(eps=1).signs((len(self.labels), *like.shape[1:]), self.draw)[rows]

    def _chequers(self, like: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        height, width = (torch.arange(size, device=like.device) for size in like.shape[-2:])
        coarse = like[..., : len(height) // 2 + 1, : len(width) // 2 + 1]
        cells = self._signs(coarse, rows).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return cells[..., : len(height), : len(width)] * (1 - 2 * ((height[:, None] + width) % 2))


def _cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).sum(0) / (first.square().sum(0) * second.square().sum(0)).sqrt()
