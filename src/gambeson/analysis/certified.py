"""Certified accuracy: what no perturbation in a ball can undercut, image by image and for one perturbation for all.

Layers are relaxed to linear bounds that are propagated back to the pixels (CROWN, Zhang et al. 2018, arXiv 1811.00866).
That one perturbation is shared by all images is used as well (ours): a linear bound of each image's margin in the
shared perturbation bounds the number of images that it can break together, by a linear program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gambeson.analysis.chain import Affine, Layer, ReLU, chain_of
from gambeson.analysis.inputs import classifier
from gambeson.base import Config, UserError, task
from gambeson.data import Split
from gambeson.tasks import Rate
from gambeson.threat import Ball
from gambeson.victim import Source

_SLACK = 1e-6
"""Margin that rounding may take, as a share of the largest logit: bounds are computed in float64, models are not."""
LARGEST = 0.5
"""Radii are smaller."""
_CHUNK = 256
"""Rows that are propagated back at once."""


class CertifiedAccuracy(Config):
    """Lower bounds on the accuracy on a sample of images."""

    eps: float
    """Radius in pixel units; the norm is inf."""
    clean: Rate
    per_image: Rate
    """Share that is right and stays so under every perturbation of its own: a lower bound on the accuracy under any
    attack, with its interval."""
    universal: float
    """Lower bound on the accuracy on these very images under any one perturbation for all of them; never below that of
    ``per_image``. It is a statement about these images together, so that it has no interval."""
    unstable: float
    """Mean share of the ReLUs whose sign is not known: the closer to zero, the tighter the bounds."""


def certified_accuracy(
    model: Source, data: Any, *, eps: float | str, images: int = 100, seed: int = 0
) -> CertifiedAccuracy:
    """Bound from below the accuracy under every perturbation of norm inf, and under every single one for all images.

    Sound for chains of affine layers, ReLU and max-pooling, such as LeNet. The bounds are loose for deep networks, for
    such as were not trained to withstand anything, and for a large eps: they are then zero and say nothing. Cost: some
    thousand rows of products of the layers' dense matrices per image, a fraction of a second for LeNet-5.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        eps: radius in pixel units, below 0.5.
        images: of the stratified sample that is looked at.
        seed: of the sample.

    Raises:
        UserError: a random model, layers of another kind, or an eps out of range.
    """
    radius = Ball(eps=eps).eps
    if radius >= LARGEST:
        raise UserError(f"eps = {eps} is out of range: expected a radius below {LARGEST:g}")
    with classifier(model, data) as (victim, split):
        if victim.inspect(split.take(slice(0, 8), victim.device)[0]).varies:
            raise UserError("the model is random, but certified bounds need a deterministic one: turn its noise off")
        chosen = split.sample(images, seed=seed)
        return bounded(chain_of(victim.model, chosen.take(slice(0, 1), "cpu")[0]), chosen, radius)


def bounded(
    layers: Sequence[Layer], split: Split, eps: float, before_each: Callable[[], None] | None = None
) -> CertifiedAccuracy:
    """Return the bounds of :func:`certified_accuracy` on a whole split, for a model that is known as a chain of layers.

    ``before_each`` is called before each image; it may raise, as a limit on time does.
    """
    points, labels = split.take(slice(None), "cpu")
    bounds = []
    with task("  certify", len(points)) as advance, torch.no_grad():
        for x, y in zip(points.double().flatten(1), labels.tolist(), strict=True):
            if before_each is not None:
                before_each()
            bounds.append(Bound.of(layers, x, y, eps))
            advance()
    right, sure = sum(one.clean for one in bounds), sum(one.certified for one in bounds)
    broken = broken_together([one for one in bounds if one.clean and not one.certified], eps)
    return CertifiedAccuracy(
        eps=eps,
        clean=Rate.of(right, len(bounds)),
        per_image=Rate.of(sure, len(bounds)),
        universal=(right - broken) / len(bounds),
        unstable=sum(one.unstable for one in bounds) / len(bounds),
    )


@dataclass(frozen=True)
class Bound:
    """What is known of one image."""

    clean: bool
    """Whether it is right."""
    certified: bool
    """Whether it is, under every perturbation."""
    slope: torch.Tensor
    """(J, D): of the margins that are not certified, a linear lower bound in the shared perturbation."""
    offset: torch.Tensor
    """(J,)"""
    unstable: float = 0.0
    """Share of the ReLUs whose sign is not known."""

    @classmethod
    def of(cls, layers: Sequence[Layer], x: torch.Tensor, label: int, eps: float) -> Bound:
        """Bound the margins of a flat image (D,) against every other class."""
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        relaxed, exact = Relaxed.around(layers, low, high), Relaxed.around(layers, x, x)
        logits = exact.last[0]
        unit = torch.eye(len(logits), dtype=x.dtype)
        margins = unit[label] - unit[torch.arange(len(logits)) != label]
        slope, offset = relaxed.linear(margins)
        slack = _SLACK * float(logits.abs().max())
        unknown = _least(slope, offset, low, high) <= slack
        shared, shift = in_shared(slope[unknown], x, eps)
        clean = bool((margins @ logits > 0).all())
        sure = clean and not bool(unknown.any())
        return cls(clean, sure, shared, offset[unknown] + shift - slack, relaxed.unstable)


def _least(slope: torch.Tensor, offset: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return the lowest values (R,) of linear functions in a box."""
    return offset + slope.clamp(min=0) @ low + slope.clamp(max=0) @ high


def in_shared(slope: torch.Tensor, x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn linear lower bounds in the image into such in the shared perturbation.

    The perturbed image is clipped: it moves by ``clip(delta, -x, 1 - x)``, which lines bound as they do a ReLU: next to
    black it is ``max(delta, -x)``, with its tangent below and its chord above; next to white ``min(delta, 1 - x)``.

    Args:
        slope: (J, D).
        x: (D,), the image.
        eps: radius, below 0.5.

    Returns:
        Slopes (J, D), and what comes on top of the offsets (J,).
    """
    low, high = (-x).clamp(min=-eps), (1 - x).clamp(max=eps)
    dark, bright = low > -eps, high < eps
    chord = (high - low) / (2 * eps) if eps else torch.ones_like(x)
    start = low + chord * eps  # of the chord, at delta = 0
    up, down = slope.clamp(min=0), slope.clamp(max=0)
    under, over = torch.where(bright, chord, 1.0), torch.where(dark, chord, 1.0)
    shift = slope @ x + up @ torch.where(bright, start, 0.0) + down @ torch.where(dark, start, 0.0)
    return up * under + down * over, shift


def broken_together(bounds: Sequence[Bound], eps: float) -> int:
    """Return an upper bound on the number of images that one perturbation of norm inf breaks at once.

    It breaks an image only where one of its margins, and so its lower bound ``m = slope @ delta + offset``, is not
    positive. With U the largest m in the ball, ``1 - w m`` is at least 1 there and never negative, for all w from 0 to
    1 / U. Summed over images this is linear in delta, and largest at a corner of the ball: the offsets' part plus eps
    times the norm 1 of the weighted sum of slopes. A linear program chooses the weights; any weights give a bound.

    Args:
        bounds: of images that are right and not certified.
        eps: radius.
    """
    from scipy.optimize import linprog

    if not bounds or eps == 0:
        return len(bounds)
    slope, offset = torch.cat([one.slope for one in bounds]), torch.cat([one.offset for one in bounds])
    owner = torch.cat([torch.full((len(one.offset),), k) for k, one in enumerate(bounds)])
    most = (offset + eps * slope.abs().sum(1)).clamp(min=0)
    pairs, count, size = len(offset), len(bounds), slope.shape[1]
    margins = owner.bincount(minlength=count).double()
    # Variables: the weights w; for each image the share t that is given up as broken; the parts s of the norm.
    cost = torch.cat([-offset, 1 - margins, offset.new_full((size,), eps)])
    rows = offset.new_zeros(2 * size + pairs, pairs + count + size)
    rows[:size, :pairs], rows[size : 2 * size, :pairs] = slope.T, -slope.T
    rows[:size, -size:] = rows[size : 2 * size, -size:] = -torch.eye(size, dtype=offset.dtype)
    rows[2 * size :, :pairs] = torch.diag(most)
    rows[2 * size + torch.arange(pairs), pairs + owner] = 1  # w U <= 1 - t
    limits = torch.cat([offset.new_zeros(2 * size), offset.new_ones(pairs)])
    ranges = [(0, None if value > 0 else 0) for value in most.tolist()] + [(0, 1)] * count + [(0, None)] * size
    found = linprog(cost.numpy(), rows.numpy(), limits.numpy(), bounds=ranges, method="highs")
    if found.x is None:
        return count
    chosen = torch.tensor(found.x, dtype=offset.dtype)
    given = chosen[pairs : pairs + count].clamp(0, 1)
    weight = chosen[:pairs].clamp(min=0)
    weight = torch.where(most > 0, torch.minimum(weight, (1 - given)[owner] / most), 0.0)
    total = (given + (1 - given) * margins).sum() - weight @ offset + eps * (weight @ slope).abs().sum()
    return min(count, int(float(total) + 1e-9))


@dataclass
class Relaxed:
    """Linear bounds of all layers of a chain, for the images of a box."""

    layers: Sequence[Layer]
    low: torch.Tensor
    """(D,), the darkest image of the box."""
    high: torch.Tensor
    """(D,), the brightest."""
    ends: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """The lowest and highest values that enter each layer."""
    last: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    """Those of the logits."""
    unstable: float = 0.0
    """Share of the ReLUs whose sign is not known."""

    @classmethod
    def around(cls, layers: Sequence[Layer], low: torch.Tensor, high: torch.Tensor) -> Relaxed:
        """Bound the values of one layer after the other."""
        found = cls(layers, low, high)
        unknown, relus, now = 0, 0, (low, high)
        for k, layer in enumerate(layers):
            found.ends.append(now)
            if isinstance(layer, Affine):
                now = found._after(k, layer, *now)
            elif isinstance(layer, ReLU):
                unknown, relus = unknown + int(((now[0] < 0) & (now[1] > 0)).sum()), relus + len(now[0])
                now = now[0].clamp(min=0), now[1].clamp(min=0)
            else:
                now = now[0][layer.windows].amax(1), now[1][layer.windows].amax(1)
        found.last, found.unstable = now, unknown / max(1, relus)
        return found

    def _after(self, k: int, layer: Affine, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of an affine layer: by intervals, and by linear bounds where a sign is then unknown."""
        up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        least, most = up @ low + down @ high + layer.bias, up @ high + down @ low + layer.bias
        if k == 0 or bool((self.low == self.high).all()):
            return least, most
        for some in ((least < 0) & (most > 0)).nonzero().flatten().split(_CHUNK):
            unit = least.new_zeros(len(some), len(least))
            unit[torch.arange(len(some)), some] = 1
            above = _least(*self.linear(unit, k + 1), self.low, self.high)
            below = -_least(*self.linear(-unit, k + 1), self.low, self.high)
            least[some], most[some] = torch.maximum(least[some], above), torch.minimum(most[some], below)
        return least, torch.maximum(least, most)

    def linear(self, rows: torch.Tensor, upto: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return linear lower bounds in the image of linear functions of what a layer returns.

        Args:
            rows: (R, M), the functions.
            upto: number of layers before it, itself included; None: all.

        Returns:
            Slopes (R, D) and offsets (R,).
        """
        offset = rows.new_zeros(len(rows))
        pick: torch.Tensor | None = None  # the values that the columns of rows belong to; None: all, in order
        for layer, (low, high) in zip(reversed(self.layers[:upto]), reversed(self.ends[:upto]), strict=True):
            if isinstance(layer, Affine):
                weight, bias = (layer.weight, layer.bias) if pick is None else (layer.weight[pick], layer.bias[pick])
                offset, rows, pick = offset + rows @ bias, rows @ weight, None
                continue
            up, down = rows.clamp(min=0), rows.clamp(max=0)
            if isinstance(layer, ReLU):
                low, high = (low, high) if pick is None else (low[pick], high[pick])
                crosses = (low < 0) & (high > 0)
                chord = torch.where(crosses, high / (high - low).clamp(min=1e-300), (low >= 0).to(low))
                tangent = torch.where(crosses, (high > -low).to(low), (low >= 0).to(low))
                offset = offset - down @ (chord * low * crosses)
                rows = up * tangent + down * chord
            else:
                windows = layer.windows if pick is None else layer.windows[pick]
                least, most = low[windows], high[windows]
                best = least.argmax(1, keepdim=True)
                pick = windows.gather(1, best).flatten()
                others = torch.where(windows == pick[:, None], -torch.inf, most).amax(1)
                alone = (least.gather(1, best).flatten() >= others).to(rows)
                offset = offset + down @ ((1 - alone) * most.amax(1))
                rows = up + down * alone
        if pick is not None:
            rows = rows.new_zeros(len(rows), len(self.low)).index_add_(1, pick, rows)
        return rows, offset
