"""Jacobian regularisation, with four estimators of the squared Frobenius norm from products with random directions.

For unit v in output space E[K ||v J||^2] = ||J||_F^2 (Hoffman et al. 2019), and since tr(J J^T) = tr(J^T J) the same
holds in input space: E[n ||J u||^2] = ||J||_F^2. In a space of d dimensions one direction has the relative standard
deviation sqrt(2 / (d + 2) * (d * sum l^2 / (sum l)^2 - 1)), l the eigenvalues of J J^T.

Of label maps, ||J||^2 is the mean over the labelled pixels p of ||d f_p / dx||_F^2, f_p the logits of one pixel: on the
scale of classification, for images of any size, as the loss is. A direction is one of the whole map, at the cost of one
of classification, and its relative deviation is smaller, since the Jacobian of a map has far more eigenvalues.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.autograd import forward_ad

from gambeson.base import Config, Number, UserError, average, generator, twice_differentiable
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, SharedForward, Term, TrainContext
from gambeson.defenses.registry import register

MOST_OUTPUTS = 1000
"""Outputs per image up to which the exact norm is computed, by as many products whose graphs are all kept."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a step used for the norm, evenly spaced over the batch of all processes."""

    rows: torch.Tensor
    """Indices of this process's chosen images."""
    numbers: torch.Tensor
    """Their indices among the chosen images of all processes."""
    count: int
    """Number of chosen images of all processes."""
    processes: int

    @classmethod
    def of(cls, batch: Batch, share: float) -> Part:
        """Choose ``share`` of the images, at least one per process."""
        (number, processes), here = batch.place, len(batch.images)
        count = max(processes, round(share * here * processes))
        chosen = torch.arange(count) * (here * processes) // count
        mine = (chosen // here == number).nonzero().flatten()
        device = batch.images.device
        return cls(
            rows=(chosen[mine] - number * here).to(device), numbers=mine.to(device), count=count, processes=processes
        )

    def mean(self, squares: torch.Tensor) -> torch.Tensor:
        """Average over the chosen images, so that the mean over the processes is that of the joined batch."""
        return squares.sum() * (self.processes / self.count)


def directions(shape: tuple[int, ...], generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Draw (R, P, ...) directions uniformly from the sphere of radius sqrt(d) over all dimensions after the second.

    With that radius the squared product with a direction is an unbiased estimate, and the root mean square of a
    direction is 1.
    """
    drawn = torch.randn(shape, generator=generator, device=generator.device).to(like)
    flat = drawn.flatten(2)
    return (flat * (math.sqrt(flat.shape[2]) / flat.norm(dim=2, keepdim=True))).view(shape)


def pulled(logits: torch.Tensor, point: torch.Tensor, vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the mean over P of ||v J||^2 for each image, (N,), by P differentiable backward passes.

    Args:
        logits: (N, K) or (N, K, H, W), of ``point``.
        point: (N, C, H, W), with a gradient.
        vectors: (N, P, K or K*H*W), already weighted if units do not count alike.
        scale: (1, C, 1, 1) or (): a unit of the chosen space in pixels.
    """
    total = logits.new_zeros(len(logits))
    for vector in vectors.unbind(1):
        (product,) = torch.autograd.grad(logits.flatten(1), point, vector, create_graph=True)
        total = total + (product * scale).flatten(1).square().sum(1)
    return total / vectors.shape[1]


def differenced(
    model: nn.Module, images: torch.Tensor, rows: torch.Tensor, moves: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``images`` and the mean over P of ||(f(x + step u) - f(x)) / step||^2 for each of ``rows``.

    The norm is that over the classes: (R,), or (R, H, W) of label maps. One forward of both, in which BatchNorm uses
    the same statistics for both, as constants.

    Args:
        model: pixels to logits.
        images: (N, C, H, W).
        rows: (R,) indices of the moved images.
        moves: (R, P, C, H, W), the directions u.
        step: length of a move, as a multiple of u.

    Raises:
        UserError: the model is random, so that the difference would include that of two draws.
    """
    before = _random_state(images.device)
    moved = (images[rows].unsqueeze(1) + step * moves).flatten(0, 1)
    answers = model(torch.cat([images, moved]))
    if not torch.equal(before, _random_state(images.device)):
        raise UserError(
            "the model draws random numbers in its forward (dropout or noise), which a finite difference would "
            "measure: choose derivative='forward-mode' or estimator='projection'"
        )
    logits, others = answers[: len(images)], answers[len(images) :]
    change = (others.unflatten(0, moves.shape[:2]) - logits[rows].unsqueeze(1)) / step
    return logits, change.square().sum(2).mean(1)


def pushed(
    model: nn.Module, images: torch.Tensor, rows: torch.Tensor, moves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``images`` and the mean over P of ||J u||^2 for each of ``rows``, by forward mode.

    Shapes as in :func:`differenced`. Images that are not in ``rows`` have a plain forward.
    """
    _load_rules()
    times = moves.shape[1]
    # Not a plain dual level: its in-place rule for logsumexp breaks the backward (torch 2.15).
    found, product = torch.func.jvp(model, (images[rows].repeat_interleave(times, 0),), (moves.flatten(0, 1),))[:2]
    squares = product.unflatten(0, moves.shape[:2]).square().sum(2).mean(1)
    if len(rows) == len(images):
        return found[::times], squares
    rest = torch.ones(len(images), dtype=torch.bool, device=rows.device)
    rest[rows] = False
    others = rest.nonzero().flatten()
    order = torch.cat([rows, others]).argsort()
    return torch.cat([found[::times], model(images[others])])[order], squares


def _shares(batch: Batch, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the weight of each unit in the mean of its image, in the shape of the labels: 0 if it does not count."""
    valid = batch.task.valid(batch.labels[rows])
    count = batch.task.units(valid).sum(1).clamp(min=1)
    return valid.to(like) / count.view(-1, *[1] * (valid.ndim - 1))


def joins_images(model: nn.Module) -> bool:
    """Whether BatchNorm makes an image's logits depend on the rest of the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())


@contextmanager
def still(model: nn.Module, active: bool) -> Iterator[None]:
    """Let BatchNorm use its running statistics without updating them inside the block, if ``active``."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [module for module in norms if active and module.training]
    try:
        for module in held:
            module.training = False
        yield
    finally:
        for module in held:
            module.training = True


@functools.cache
def _load_rules() -> None:
    """Load torch's forward-mode rules, which warn at first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


class JacobianSettings(Config):
    """Estimator of the norm, and the images, steps and space it is computed on."""

    estimator: Literal["projection", "exact", "input", "stacked"] = "projection"
    """``projection``: random unit vectors in output space, by a double backward (the paper's). ``exact``: every
    output, K double backwards. ``input`` (ours): random directions in input space, without a double backward.
    ``stacked`` (ours): one such direction for the whole batch; the mean is the norm of the stacked Jacobian, which
    bounds what a universal perturbation can do."""
    n_proj: Annotated[int, Field(ge=1)] = 1
    """Directions per image (``stacked``: per batch). From K on, ``projection`` is ``exact``."""
    derivative: Literal["forward-mode", "finite-difference"] = "forward-mode"
    """``input`` and ``stacked``: an exact product, or one more forward of the moved images in the clean one's batch.
    The difference is an average over its step; its gradient jumps by 1 / ``step`` where the step crosses a kink, which
    the exact product does not see."""
    step: Annotated[Number, Field(gt=0)] = 1e-2
    """Finite difference: root mean square of the move. A short one has rare, huge gradients: 2e-3 led to collapse on
    the digits."""
    jitter: Annotated[Number, Field(ge=0)] = 0.0
    """Finite difference: standard deviation of noise added to the chosen images first, also in the clean loss.
    Max-pooling ties on flat background, and a move selects the larger side of each tie: the estimate was 5 to 10 % too
    large on Fashion-MNIST. A few times ``step`` corrects that."""
    share: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the batch used for the norm, with the same expectation (ours; 1 is the paper's)."""
    every: Annotated[int, Field(ge=1)] = 1
    """Compute the norm only in every so many steps, with as many times the weight (ours; 1 is the paper's)."""
    space: Literal["pixel", "normalised"] = "pixel"
    """Input space of the norm. The public code's is normalised, in which the norm is that in pixel space times the
    standard deviation of each channel, so that the same strength is std^2 times as effective."""
    power: bool = False
    """``stacked``: keep one direction and update it by power iteration, towards the largest singular value; the term is
    then sigma_1^2 / 2N of the stacked Jacobian instead of the mean squared norm / 2."""
    inertia: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """``power``: decay of the direction per step, which averages over batches (ours)."""

    @model_validator(mode="after")
    def _check_power(self) -> JacobianSettings:
        if self.power and (self.estimator != "stacked" or self.n_proj != 1):
            raise ValueError("power iteration needs estimator='stacked' and n_proj=1")
        return self


class JacobianNorm(JacobianSettings):
    """R = mean of ||df/dx||_F^2 / 2, f the logits (Hoffman et al. 2019, as Co et al. 2021 use it).

    Of label maps f is the logits of a pixel, and the mean is over the labelled pixels of each image, then over images
    (ours): a strength suits images of any size, and pixels without a label have no part in the norm.

    Every estimator has this expectation (``power`` aside). In training mode BatchNorm couples the images of a batch, so
    that the paper's estimator uses the batch's Jacobian; measure models in evaluation mode. If the norm has a separate
    forward, BatchNorm uses its running statistics there (ours): in forward mode with BatchNorm, for ``projection`` and
    ``exact`` on a part of the batch, and under autocast, where the norm is in float32.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return R with its graph; zero in steps skipped by ``every``.

        Raises:
            UserError: gradients are off, the space is unknown, or the model does not fit the derivative.
        """
        return self.with_logits(model, batch)[1]

    def with_logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Also return the clean logits, if R needed them for the whole batch."""
        if self.power:
            raise UserError("power iteration has a state: use the term that with_state(shape, seed) returns")
        return self._evaluate(model, batch, None)

    def with_state(self, shape: tuple[int, ...], seed: int) -> Term:
        """Return the term for images of ``shape`` (C, H, W): itself, or for ``power`` one with a state."""
        return PowerNorm(self, shape, seed) if self.power else self

    def _evaluate(
        self, model: nn.Module, batch: Batch, direction: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not torch.is_grad_enabled():
            raise UserError("the Jacobian's norm needs gradients: call it outside torch.no_grad")
        if batch.step % self.every:
            return None, batch.images.new_zeros(())
        part, kind = Part.of(batch, self.share), batch.images.device.type
        outward, forward = self.estimator in ("projection", "exact"), self.derivative == "forward-mode"
        alone = self.share < 1 if outward else forward and joins_images(model)
        alone = alone or torch.is_autocast_enabled(kind)
        images, rows = self._jittered(batch, part), part.rows
        if alone:
            images, rows = images[rows], torch.arange(len(rows), device=rows.device)
        with torch.autocast(kind, enabled=False), still(model, alone), twice_differentiable(model):
            if outward:
                logits, squares = self._pull(model, images, batch, part)
            else:
                moves = self._moves(model, batch, part, direction)
                push = pushed if forward else partial(differenced, step=self.step)
                logits, squares = push(model, images, rows, moves)
                squares = batch.task.per_image(squares, batch.labels[part.rows])
            return None if alone else logits, part.mean(squares) * (self.every / 2)

    def _pull(
        self, model: nn.Module, images: torch.Tensor, batch: Batch, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor]:
        point = images.detach().requires_grad_()
        logits = model(point)
        outputs = logits[0].numel()
        if self.estimator == "exact" or self.n_proj >= outputs:
            if outputs > MOST_OUTPUTS:
                raise UserError(
                    f"estimator='exact' needs a double backward for each of {outputs} outputs per image, and more than "
                    f"{MOST_OUTPUTS} do not fit in memory: choose estimator='projection' or 'input'"
                )
            every = torch.eye(outputs, dtype=logits.dtype, device=logits.device) * math.sqrt(outputs)
            vectors = every.expand(len(logits), -1, -1)
        else:
            draw = generator(batch.seed, "jacobian", device=logits.device)
            vectors = directions((part.count, self.n_proj, outputs), draw, logits)[part.numbers]
        weights = _shares(batch, part.rows, logits).sqrt()
        vectors = vectors * weights.unsqueeze(1).expand(logits.shape).flatten(1).unsqueeze(1)
        return logits, pulled(logits, point, vectors, self._scale(model))

    def _moves(self, model: nn.Module, batch: Batch, part: Part, direction: torch.Tensor | None) -> torch.Tensor:
        rows, images = len(part.rows), batch.images
        if direction is None:
            draw = generator(batch.seed, "jacobian", device=images.device)
            apart = self.estimator == "input"
            shape = (part.count if apart else 1, self.n_proj, *images.shape[1:])
            direction = directions(shape, draw, images)
            direction = direction[part.numbers] if apart else direction
        return (direction * self._scale(model)).expand(rows, *[-1] * (direction.ndim - 1))

    def _jittered(self, batch: Batch, part: Part) -> torch.Tensor:
        if not self.jitter or self.estimator in ("projection", "exact") or self.derivative == "forward-mode":
            return batch.images
        draw = generator(batch.seed, "jacobian", "jitter", device=batch.images.device)
        noise = torch.randn((part.count, *batch.images.shape[1:]), generator=draw, device=batch.images.device)
        return batch.images.index_add(0, part.rows, noise[part.numbers].to(batch.images), alpha=self.jitter)

    def _scale(self, model: nn.Module) -> torch.Tensor:
        if self.space == "pixel":
            return torch.ones(())  # a number on every device
        std = getattr(getattr(model, "normalize", None), "std", None)
        if not isinstance(std, torch.Tensor):
            raise UserError(
                f"{type(model).__name__} has no known normalisation: choose space='pixel', or a model of models.create"
            )
        return std


class PowerNorm(nn.Module):
    """A lower bound of sigma_1^2 / 2N of the stacked Jacobian, along a direction that tracks its top singular vector.

    Power iteration at no cost: the gradient of ||J v||^2 / 2 with respect to v is J^T J v, which the backward of the
    objective computes.

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
        return self.with_logits(model, batch)[1]

    def with_logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Also return the clean logits, if they were needed."""
        self._used = self.direction.to(batch.images).detach().clone().requires_grad_()
        pixels = self._used.numel()
        logits, value = self.norm._evaluate(model, batch, (self._used * math.sqrt(pixels))[None, None])
        return logits, value / pixels

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Update the direction with the gradient of the backward pass."""
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


@register("jacobian", source="Co et al. 2021; Hoffman et al. 2019", cost="1 / 2")
class Jacobian(JacobianSettings, Defense):
    """Minimise E[CE(f(x), y)] + strength * E[||df/dx||_F^2] / 2 (Hoffman, Roberts, Yaida 2019, arXiv 1908.02729).

    The default is the public code's estimator, one random projection per image. The paper's strength, data sets and
    schedule are not known to us.

    Cheap forms with the same expectation use one forward-mode product on a part of every second or fourth batch::

        Jacobian(estimator="input", share=1 / 8, every=2)
        Jacobian(estimator="input", share=1 / 4, every=4)
    """

    strength: Annotated[Number, Field(ge=0)] = 0.01
    """Weight of the norm, in the space ``space``; 0 is standard training. Ours: in pixel space, where the
    public code's 0.01 of normalised space would be 0.01 times the square of the pixels' standard deviation."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean term and the norm."""
        return {"clean": (1.0, Clean(label_smoothing=self.label_smoothing)), "jacobian": (self.strength, self._norm)}

    def build_objective(self, context: TrainContext) -> Objective:
        """Both terms, sharing one forward."""
        norm = self._norm.with_state(tuple(context.train.shape), context.seed)
        return SharedForward(self.terms() | {"jacobian": (self.strength, norm)})

    @property
    def _norm(self) -> JacobianNorm:
        return JacobianNorm(**{name: getattr(self, name) for name in JacobianSettings.model_fields})
