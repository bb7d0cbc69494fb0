"""Norm balls: projections, random draws and steepest steps.

Every function treats the rows of a tensor (R, C, H, W) independently, so one ball serves one
perturbation per image (R = N), one per heap (R = N / s) and one for all (R = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from gambeson.base import Config, Number, UserError
from gambeson.base.checks import TOLERANCE
from gambeson.threat.projections import TINY, fill_greedily, largest_share, project_l1_box, project_l2_box

Eps = Annotated[Number, Field(ge=0)]
"""A radius in pixel units (images are in [0, 1]); text such as ``8/255`` is accepted."""


def _spelling(value: Any) -> str:
    return str(value).lower().removeprefix("l")


def _check_unit(norm: str, info: ValidationInfo) -> str:
    """Refuse an eps of the same object, a number or several, that exceeds the pixels' range."""
    eps = info.data.get("eps")
    largest = max(eps, default=0) if isinstance(eps, tuple) else eps or 0
    if norm == "inf" and largest > 1:
        steps = f"; did you mean {largest:g}/255?" if largest <= 255 and largest == round(largest, 1) else ""
        reason = f"{largest:g} is too large: it has to be at most 1, because pixels are in [0, 1]{steps}"
        raise UserError(f"eps = {reason}", ("..", "eps"), reason)
    return norm


NORM_RULES = (BeforeValidator(_spelling), AfterValidator(_check_unit))
"""Validators of a norm, for a field that stands after that of its eps."""

Norm = Annotated[Literal["inf", "2", "1"], *NORM_RULES]
"""``inf`` (largest change of a pixel), ``2`` (Euclidean length) or ``1`` (sum of the changes); ``linf``, ``l2``,
``l1``, 2 and 1 are accepted too."""


def norm_of_ones(norm: Norm, shape: Sequence[int]) -> float:
    """Return the norm of a change by 1 in every value of an image (C, H, W): the radius whose ball holds every image.

    A radius divided by it is the change per value if the radius is spread evenly.
    """
    values = math.prod(shape)
    return {"inf": 1.0, "2": math.sqrt(values), "1": float(values)}[norm]


def default_eps(shape: Sequence[int], norm: str = "inf") -> float:
    """Return the radius that a command of one radius takes where none is given: 0.2 for grey images, 8/255 for others.

    Audits have several, around 0.15 and 12/255 (:attr:`gambeson.auditing.Suite.eps`).

    Args:
        shape: (C, H, W) of an image.
        norm: ``inf``, or ``2``; see :func:`eps_in_norm`.

    Raises:
        UserError: another norm, for which none is customary.
    """
    return eps_in_norm(0.2 if shape[0] == 1 else 8 / 255, shape, norm)


def eps_in_norm(eps: float, shape: Sequence[int], norm: str) -> float:
    """Return the radius of norm 2 that is the same share of the box's diagonal as ``eps`` of its side, quartered.

    The rule is ours. ``eps`` itself is returned for norm inf.

    Raises:
        UserError: another norm.
    """
    if norm == "inf":
        return eps
    if norm != "2":
        raise UserError(f"there is no customary eps for the norm {norm}: give one, for example --eps 10")
    return round(eps * norm_of_ones("2", shape) / 4, 3)


class Ball(Config):
    """All perturbations whose norm is at most eps."""

    eps: Eps
    """Radius in pixel units."""
    norm: Norm = "inf"

    @cached_property
    def _radius(self) -> float:
        """The largest float32 that is not above eps, so that no float32 perturbation ever leaves the ball."""
        nearest = torch.tensor(self.eps, dtype=torch.float32)
        below = torch.nextafter(nearest, torch.zeros(()))
        return float(nearest if float(nearest) <= self.eps else below)

    @property
    def limit(self) -> float:
        """The largest norm that counts as inside: a thousandth above eps, as sums over many pixels are rounded."""
        return self.eps * (1 + 1e-3) + TOLERANCE

    def project(self, delta: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """Return the Euclidean projection of each row onto the ball.

        Args:
            delta: (R, C, H, W).
            sizes: (R, 1, 1, 1), the radius of each row's ball as a share of eps; None: eps for every row.
        """
        if self.norm == "inf":
            if sizes is None:
                return delta.clamp(-self._radius, self._radius)
            return delta.clamp(-self._radius * sizes, self._radius * sizes)
        if self.norm == "1":
            rows, eps = delta.flatten(1), self._eps_of(sizes)
            inside = rows.abs().sum(1, keepdim=True) <= eps
            return torch.where(inside, rows, project_l1_box(rows, rows.abs(), eps)).view_as(delta)
        reach = self.eps if sizes is None else self.eps * sizes
        return delta * (reach / _lengths(delta).clamp(min=TINY)).clamp(max=1)

    def project_in_box(
        self, delta: torch.Tensor, low: torch.Tensor, high: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the Euclidean projection of each row onto the part of the ball between ``low`` and ``high``.

        For the norms 2 and 1 this is not the projection followed by a clip, which wastes part of the radius
        (Croce and Hein 2021, section 3). A row whose projection onto the ball lies in the box is returned bit-identical
        to it.

        Args:
            delta: (R, C, H, W).
            low: same shape, not above zero.
            high: same shape, not below zero.
            sizes: see :meth:`project`.
        """
        plain = self.project(delta, sizes)
        clipped = torch.minimum(torch.maximum(plain, low), high)
        if self.norm == "inf":
            return clipped
        room = torch.where(delta > 0, high, -low).flatten(1)
        exact = (project_l1_box if self.norm == "1" else project_l2_box)(
            delta.flatten(1), room, self._eps_of(sizes)
        ).view_as(delta)
        free = (clipped == plain).flatten(1).all(1).view(-1, 1, 1, 1)
        return torch.where(free, plain, exact)

    def _eps_of(self, sizes: torch.Tensor | None) -> float | torch.Tensor:
        """Return the radius: a number, or (R, 1) with one per row."""
        return self.eps if sizes is None else self.eps * sizes.flatten(1)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the direction of unit norm along which a linear function with this gradient rises fastest.

        A row whose gradient is zero gets the zero direction.
        """
        if self.norm == "inf":
            return gradient.sign()
        if self.norm == "1":  # the largest value only; the first of several equal ones
            rows = gradient.flatten(1)
            return fill_greedily(rows, torch.ones_like(rows), 1.0).view_as(gradient)
        return gradient / _lengths(gradient).clamp(min=TINY)

    def step_in_box(
        self,
        gradient: torch.Tensor,
        length: torch.Tensor | float,
        room: torch.Tensor,
        sparsity: float | None = None,
    ) -> torch.Tensor:
        """Return a step of norm ``length`` up the gradient, none of it spent on values that cannot move.

        Norm 2: the values that can move have this length; the others keep their gradient, up to twenty times as long,
        which the projection needs to hold them at the box. Norm 1: only values that can move are moved. Norm inf:
        ``length`` times :meth:`steepest`.

        Args:
            gradient: (R, C, H, W).
            length: in pixel units; a number, or (R, 1, 1, 1).
            room: (R, C, H, W), not negative: how far each value may go in the direction of its gradient.
            sparsity: norm 1 only: the share of values moved, each equally (SLIDE, Tramer and Boneh 2019); None
                fills value after value (the steepest step, Croce and Hein 2021).
        """
        if self.norm == "inf":
            return length * gradient.sign()
        if self.norm == "2":
            free = _lengths(gradient.masked_fill(room <= 0, 0))
            return length * (gradient / free.maximum(_lengths(gradient) / 20).clamp(min=TINY))
        rows, rooms = gradient.flatten(1), room.flatten(1)
        if sparsity is not None:
            return length * largest_share(rows, rooms, sparsity).view_as(gradient)
        reach = length.flatten(1) if isinstance(length, torch.Tensor) else length
        return fill_greedily(rows, rooms, reach).view_as(gradient)

    def uniform(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw rows uniformly from the ball, on the generator's device."""
        if self.norm == "inf":
            return (torch.rand(shape, generator=generator, device=generator.device) * 2 - 1) * self._radius
        if self.norm == "1":  # the first D of D + 1 exponentials over their sum are uniform on the simplex
            size = max(1, torch.Size(shape[1:]).numel())
            draw = torch.empty((shape[0], size + 1), device=generator.device).exponential_(generator=generator)
            share = draw[:, :-1] / draw.sum(1, keepdim=True).clamp(min=TINY)
            signs = torch.randint(0, 2, share.shape, generator=generator, device=generator.device) * 2 - 1
            return self.project((share * signs * self.eps).view(shape))
        direction = torch.randn(shape, generator=generator, device=generator.device)
        radius = torch.rand(len(direction), generator=generator, device=generator.device)
        radius = radius.pow(1 / max(1, direction[0].numel())).view(-1, *[1] * (direction.ndim - 1))
        return direction / _lengths(direction).clamp(min=TINY) * radius * self.eps

    def signs(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw rows of independent random signs, scaled to the surface of the ball."""
        draw = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        return self.fill(draw.float() * 2 - 1)

    def fill(self, pattern: torch.Tensor) -> torch.Tensor:
        """Scale each row to norm eps, the strongest form of a fixed pattern."""
        if self.norm == "inf":
            return pattern / pattern.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=TINY) * self._radius
        lengths = _lengths(pattern) if self.norm == "2" else pattern.abs().sum(dim=(1, 2, 3), keepdim=True)
        return pattern / lengths.clamp(min=TINY) * self.eps

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the norm of each row, shape (R,)."""
        rows = delta.flatten(1)
        if self.norm == "inf":
            return rows.abs().amax(1)
        return rows.abs().sum(1) if self.norm == "1" else rows.norm(dim=1)


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(1).norm(dim=1).view(-1, *[1] * (rows.ndim - 1))


BoxGradient = Literal["exact", "straight-through"]
"""How the clip to [0, 1] is differentiated: ``exact`` gives a pixel outside [0, 1] no gradient;
``straight-through`` passes the gradient on, so that a shared perturbation can leave a pixel where most
images are black or white and its own value points outside the range (our choice, for universal attacks)."""


def perturb(images: torch.Tensor, delta: torch.Tensor, box_gradient: BoxGradient = "exact") -> torch.Tensor:
    """Add R perturbations to N images, each to N / R consecutive ones, and clip to [0, 1].

    Args:
        images: (N, C, H, W) in [0, 1].
        delta: (R, C, H, W); R = N is one perturbation per image, R = N / s one per heap of s (Mummadi et al. 2019,
            section 4), R = 1 a universal one. Broadcasting sums the gradient of a heap at no cost.
        box_gradient: how the clip is differentiated.

    Returns:
        (N, C, H, W) in [0, 1]; bit-identical to ``images`` where delta is zero.

    Raises:
        UserError: R does not divide N, or the perturbation is of another size than the images.
    """
    if delta.shape[1:] != images.shape[1:]:
        raise UserError(
            f"the perturbation is of shape {tuple(delta.shape)} and the images of {tuple(images.shape)}: "
            "channels, height and width must agree"
        )
    heaps = len(delta)
    if heaps == 0 or len(images) % heaps:
        raise UserError(
            f"{heaps} perturbations cannot be shared evenly by {len(images)} images: "
            "choose a sharedness that divides the batch"
        )
    if heaps in (1, len(images)):
        moved = images + delta
    else:
        moved = (images.unflatten(0, (heaps, -1)) + delta.unsqueeze(1)).flatten(0, 1)
    clipped = moved.clamp(0, 1)
    if box_gradient == "exact":
        # Not the gradient of clamp, which at the bounds is 0 or 1 depending on the torch version.
        return torch.where((moved >= 0) & (moved <= 1), moved, clipped.detach())
    return clipped.detach() + (moved - moved.detach())


def landed(images: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return perturbed images in the type of the images, none of whose values lies further away than before.

    Below float32 a value is rounded towards its image: the nearest one may lie outside the ball, as in bfloat16 by half
    of 1/256.

    Args:
        images: (N, C, H, W) in [0, 1].
        moved: same shape, in float32 or better.
    """
    kind = images.dtype
    found = moved.to(kind)
    if kind not in (torch.float16, torch.bfloat16):
        return found
    beyond = (found.to(moved) - images).abs() > (moved - images).abs()
    # Of numbers that are not negative, the next one has the next bit pattern.
    nearer = (found.abs().view(torch.int16) + torch.where(found > images, -1, 1).short()).view(kind)
    return torch.where(beyond, nearer, found)
