"""The Jacobian's norm as a term of an objective, by the estimator of the paper and by cheaper ones."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import Config, Number, UserError, average, generator
from gambeson.defenses.jacobian_estimators import Part, differenced, directions, pulled, pushed
from gambeson.defenses.terms import Batch, Term


class JacobianSettings(Config):
    """How the norm is estimated, on which images, how often and in which space."""

    estimator: Literal["projection", "exact", "input", "stacked"] = "projection"
    """``projection``: random unit vectors in output space, by a double backward (the paper's). ``exact``: every
    output, K double backwards. ``input`` (ours): random directions in input space, without a double backward.
    ``stacked`` (ours): one such direction for the whole batch; the mean is the norm of the stacked Jacobian, which
    bounds what a universal perturbation can do."""
    n_proj: Annotated[int, Field(ge=1)] = 1
    """Directions an image (``stacked``: a batch). From K on, ``projection`` is ``exact``."""
    derivative: Literal["finite-difference", "forward-mode"] = "finite-difference"
    """``input`` and ``stacked``: one more forward of the moved images, together with the clean one; or an exact
    product, dearer, that also works for models with dropout or noise."""
    step: Annotated[Number, Field(gt=0)] = 1e-3
    """Finite difference: the move's root mean square a value. Two per cent too much at the ties of max-pooling on
    flat background and a few too little across kinks from 0.01 on; far smaller ones meet float32's rounding."""
    share: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the batch on which the norm is taken, at the same expectation (ours; 1 is the paper's). Under 1 the
    double backward has a forward of its own, so that BatchNorm then takes its statistics from that part."""
    every: Annotated[int, Field(ge=1)] = 1
    """Take the norm at every so many steps only and count it as many times (ours; 1 is the paper's)."""
    space: Literal["pixel", "normalised"] = "pixel"
    """Of the inputs that the norm is taken in. The public code's is normalised: there the norm is that of pixels
    times the standard deviation of each channel, so that the same strength acts std^2 times as much."""
    power: bool = False
    """``stacked``: go on with one direction by power iteration, towards the largest singular value; the term is then
    sigma_1^2 / 2N of the stacked Jacobian in place of the mean squared norm / 2."""
    inertia: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """``power``: how much of the direction a step keeps, which averages over batches (ours)."""

    @model_validator(mode="after")
    def _check_power(self) -> JacobianSettings:
        if self.power and (self.estimator != "stacked" or self.n_proj != 1):
            raise ValueError("power iteration needs estimator='stacked' and n_proj=1")
        return self


class JacobianNorm(JacobianSettings):
    """R = mean of ||df/dx||_F^2 / 2, f the logits (Hoffman et al. 2019, as Co et al. 2021 use it).

    Every estimator has this expectation (``power`` aside). Under autocast the norm is taken in float32, by a forward
    of its own (ours). In training mode BatchNorm joins the images of a batch: the double backward and the forward
    mode then take the batch's Jacobian; measure models in evaluation mode.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return R with its graph; at steps that ``every`` leaves out, zero.

        Raises:
            UserError: gradients are off, the space is unknown, or the model does not fit the derivative.
        """
        return self.answers(model, batch)[1]

    def answers(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the clean logits too, where R has needed them for the whole batch."""
        if self.power:
            raise UserError("power iteration goes on from step to step: use the term that opened(shape, seed) returns")
        return self._evaluate(model, batch, None)

    def opened(self, shape: tuple[int, ...], seed: int) -> Term:
        """Return the term at work for images of ``shape`` (C, H, W): itself, but for ``power`` one with a state."""
        return PowerNorm(self, shape, seed) if self.power else self

    def _evaluate(
        self, model: nn.Module, batch: Batch, direction: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not torch.is_grad_enabled():
            raise UserError("the Jacobian's norm was asked for while gradients are off: leave torch.no_grad for it")
        if batch.step % self.every:
            return None, batch.images.new_zeros(())
        part, kind = Part.of(batch, self.share), batch.images.device.type
        lent = not torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False):
            if self.estimator in ("projection", "exact"):
                logits, squares = self._pull(model, batch, part)
                lent = lent and self.share == 1
            else:
                moves = self._moves(batch, part) if direction is None else direction
                moves = (moves * self._scale(model)).expand(len(part.rows), *[-1] * (moves.ndim - 1))
                if self.derivative == "forward-mode":
                    logits, squares = pushed(model, batch.images[part.rows], moves)
                    lent = lent and self.share == 1
                elif lent:
                    logits, squares = differenced(model, batch.images, part.rows, moves, self.step)
                else:
                    rows = torch.arange(len(part.rows), device=batch.images.device)
                    logits, squares = differenced(model, batch.images[part.rows], rows, moves, self.step)
            return logits if lent else None, part.mean(squares) * (self.every / 2)

    def _pull(self, model: nn.Module, batch: Batch, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        point = (batch.images if self.share == 1 else batch.images[part.rows]).detach().requires_grad_()
        logits = model(point)
        outputs = logits[0].numel()
        if self.estimator == "exact" or self.n_proj >= outputs:
            every = torch.eye(outputs, dtype=logits.dtype, device=logits.device) * math.sqrt(outputs)
            vectors = every.expand(len(logits), -1, -1)
        else:
            draw = generator(batch.seed, "jacobian", device=logits.device)
            vectors = directions((part.count, self.n_proj, outputs), draw, logits)[part.numbers]
        return logits, pulled(logits, point, vectors, self._scale(model))

    def _moves(self, batch: Batch, part: Part) -> torch.Tensor:
        draw = generator(batch.seed, "jacobian", device=batch.images.device)
        if self.estimator == "stacked":
            return directions((1, self.n_proj, *batch.images.shape[1:]), draw, batch.images)
        return directions((part.count, self.n_proj, *batch.images.shape[1:]), draw, batch.images)[part.numbers]

    def _scale(self, model: nn.Module) -> torch.Tensor | float:
        if self.space == "pixel":
            return 1.0
        std = getattr(getattr(model, "normalize", None), "std", None)
        if not isinstance(std, torch.Tensor):
            raise UserError(
                f"{type(model).__name__} does not say how it normalises: choose space='pixel', "
                "or a model of models.create"
            )
        return std


class PowerNorm(nn.Module):
    """sigma_1^2 / 2N of the stacked Jacobian, from below, along one direction that follows its top singular vector.

    Power iteration for nothing: the gradient of ||J v||^2 / 2 with respect to v is J^T J v, and the backward of the
    objective leaves it at v.

    Args:
        norm: the settings.
        shape: (C, H, W).
        seed: of the first direction.
    """

    direction: torch.Tensor

    def __init__(self, norm: JacobianNorm, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        first = torch.randn(shape, generator=generator(seed, "jacobian", "direction"))
        self.register_buffer("direction", first / first.norm())
        self.norm = norm
        self._used: torch.Tensor | None = None

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the term with its graph."""
        return self.answers(model, batch)[1]

    def answers(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the clean logits too, where they were needed."""
        self._used = self.direction.to(batch.images).detach().clone().requires_grad_()
        pixels = self._used.numel()
        logits, value = self.norm._evaluate(model, batch, (self._used * math.sqrt(pixels))[None, None])
        return logits, value / pixels

    @torch.no_grad()
    def follow(self, batch: Batch) -> None:
        """Turn the direction towards where the backward says that the batch is most sensitive."""
        gradient = None if self._used is None else self._used.grad
        self._used = None
        if gradient is None:
            return
        average([gradient])
        length = gradient.norm()
        keep = self.norm.inertia
        turned = keep * self.direction + (1 - keep) * (gradient / length).to(self.direction)
        if bool(length > 0) and bool(turned.norm() > 0):
            self.direction.copy_(turned / turned.norm())
