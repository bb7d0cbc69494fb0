"""Four ways to look at a Jacobian without forming it: squared norms of its products with random directions.

For unit v in output space E[K ||v J||^2] = ||J||_F^2 (Hoffman et al. 2019), and since tr(J J^T) = tr(J^T J) the same
holds in input space: E[n ||J u||^2] = ||J||_F^2. In a space of d dimensions one direction has the relative standard
deviation sqrt(2 / (d + 2) * (d * sum l^2 / (sum l)^2 - 1)), l the eigenvalues of J J^T.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import forward_ad

from gambeson.base import UserError
from gambeson.defenses.terms import Batch


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a step on which the norm is taken, spread evenly over the batch of all processes."""

    rows: torch.Tensor
    """Indices of this process's chosen images."""
    numbers: torch.Tensor
    """Their numbers among the chosen images of all processes."""
    count: int
    """Chosen images of all processes."""
    processes: int

    @classmethod
    def of(cls, batch: Batch, share: float) -> Part:
        """Choose ``share`` of the images, at least one a process."""
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
    """Draw (R, P, ...) directions uniformly from the sphere of radius sqrt(d) over all dimensions behind the second.

    With that radius the squared product with a direction is an unbiased estimate, and a value changes by 1 in the
    root mean square.
    """
    drawn = torch.randn(shape, generator=generator, device=generator.device).to(like)
    flat = drawn.flatten(2)
    return (flat * (math.sqrt(flat.shape[2]) / flat.norm(dim=2, keepdim=True))).view(shape)


def pulled(logits: torch.Tensor, point: torch.Tensor, vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the mean over P of ||v J||^2 for each image, (N,): P backward passes that can be differentiated again.

    Args:
        logits: (N, K) or (N, K, H, W), of ``point``.
        point: (N, C, H, W), with a gradient.
        vectors: (N, P, K or K*H*W).
        scale: (1, C, 1, 1) or (): what a unit of the chosen space is in pixels.
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

    One forward of both, in which BatchNorm gives both the same statistics: they count as constants here.

    Args:
        model: pixels to logits.
        images: (N, C, H, W).
        rows: (R,) indices of the images that are moved.
        moves: (R, P, C, H, W), the directions u.
        step: length of a move, as a multiple of u.

    Raises:
        UserError: the model draws random numbers, so that the difference would be that of two draws.
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
    return logits, change.flatten(2).square().sum(2).mean(1)


def pushed(
    model: nn.Module, images: torch.Tensor, rows: torch.Tensor, moves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``images`` and the mean over P of ||J u||^2 for each of ``rows``, by forward mode.

    Shapes as in :func:`differenced`. Images that are not in ``rows`` have a plain forward.
    """
    _load_rules()
    times = moves.shape[1]
    # Not a bare dual level: its rule for logsumexp works in place and breaks the backward (torch 2.15).
    found, product = torch.func.jvp(model, (images[rows].repeat_interleave(times, 0),), (moves.flatten(0, 1),))[:2]
    squares = product.unflatten(0, moves.shape[:2]).flatten(2).square().sum(2).mean(1)
    if len(rows) == len(images):
        return found[::times], squares
    rest = torch.ones(len(images), dtype=torch.bool, device=rows.device)
    rest[rows] = False
    others = rest.nonzero().flatten()
    order = torch.cat([rows, others]).argsort()
    return torch.cat([found[::times], model(images[others])])[order], squares


def joins_images(model: nn.Module) -> bool:
    """Whether BatchNorm makes an image's logits depend on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())


@contextmanager
def still(model: nn.Module, active: bool) -> Iterator[None]:
    """Let BatchNorm use its running statistics and keep them, inside the block and where ``active``."""
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
    """Let torch load its forward-mode rules, which it does at first use with a warning about its own source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
