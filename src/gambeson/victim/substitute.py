"""Stand-ins for models whose gradient is not their own: finite differences, BPDA, no gradients inside the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gambeson.base import derive, generator, seeded
from gambeson.models.outputs import at_image_size
from gambeson.victim.inspect import logits_of
from gambeson.victim.scoring import auto_batch_size


class FiniteDifferences(nn.Module):
    """A model whose gradient is estimated by central differences of its outputs, whatever its own is.

    The values of an image are divided at random into as many groups as there are ``directions``. Each group is moved
    along random signs, forwards and backwards, and its difference is spread over it along these signs. With one group
    per value these are the central differences themselves; with fewer, their expectation is the gradient's, and the
    error is that of SPSA in as many dimensions as a group has values. Both images of a pair have the same draw of a
    model that draws from torch. Probes are clipped to [0, 1], and the difference of a value is divided by how far apart
    they then lie: at black and white pixels it is one-sided. Any gradient attack runs on it; a backward of N images
    costs 2 ``directions`` N forwards.

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits.
        directions: number of groups; at most the number of values of an image.
        step: length of the differences in every pixel, in pixel units.
        seed: of the groups and signs, which change from one gradient to the next.

    Attributes:
        forwards: images sent forward for gradients so far.
    """

    def __init__(self, model: nn.Module, *, directions: int, step: float, seed: int = 0) -> None:
        super().__init__()
        self.model, self.directions, self.step, self.seed = model, directions, step, seed
        self.forwards, self._gradients = 0, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's logits."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            return _logits(self.model, images)
        with torch.no_grad():
            logits = _logits(self.model, images)
        return _Estimated.apply(images, logits, self._estimate)

    @torch.no_grad()
    def _estimate(self, images: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        values = images[0].numel()
        groups, self._gradients = min(self.directions, values), self._gradients + 1
        draw = generator(self.seed, "differences", self._gradients, device=images.device)
        group = torch.randperm(values, generator=draw, device=images.device).remainder(groups).view(images.shape[1:])
        signs = torch.randint(0, 2, images.shape[1:], generator=draw, device=images.device).to(images) * 2 - 1
        at_once = max(1, auto_batch_size(images.shape[1:], 1024) // len(images))
        found = torch.zeros_like(images)
        for k, part in enumerate(torch.arange(groups, device=images.device).split(at_once)):
            moves = self.step * signs * (group == part.view(-1, 1, 1, 1))  # (P, C, H, W)
            ends = []
            for side in (1, -1):
                probes = (images + side * moves[:, None]).clamp(0, 1).flatten(0, 1)
                with seeded(derive(self.seed, "draw", self._gradients), k):
                    ends.append(_logits(self.model, probes).unflatten(0, (len(part), len(images))))
                self.forwards += len(probes)
            differences = ((ends[0] - ends[1]) * cotangent).flatten(2).sum(2)
            found += torch.einsum("pn,pchw->nchw", differences.to(found), moves / self.step)
        apart = (images + self.step).clamp(max=1) - (images - self.step).clamp(min=0)
        return found / apart.clamp(min=torch.finfo(apart.dtype).tiny)


class BorrowedGradient(nn.Module):
    """The outputs of one model with the gradient of another: backward pass differentiable approximation.

    BPDA (Athalye et al. 2018, section 4.1) for a model as a whole, as where a copy distilled from its answers stands
    for what cannot be differentiated.

    Args:
        model: whose outputs are returned.
        substitute: whose gradient they have; logits of the same shape, or of the first classes alone: the others'
            logits then have no gradient.
    """

    def __init__(self, model: nn.Module, substitute: nn.Module) -> None:
        super().__init__()
        self.model, self.substitute = model, substitute

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's logits."""
        with torch.no_grad():
            logits = _logits(self.model, images)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return logits
        other = _logits(self.substitute, images)
        if (more := logits.shape[1] - other.shape[1]) > 0:
            other = torch.cat([other, other.new_zeros(len(other), more, *other.shape[2:])], 1)
        return other + (logits - other).detach()


class InnerGradientsOff(nn.Module):
    """A model in whose forward every gradient is zero: what optimises its input at test time stays where it began.

    Layers that move their input by gradients before they answer (anti-adversary layers, Alfarra et al. 2022; input
    purification) follow none inside, and attacks see the network behind them; the model's other operations and its own
    gradient are unchanged. What was crafted there is to be scored on the model itself (Croce et al. 2022, section 4).

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits.

    Attributes:
        gradients: backward passes that forwards have run so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.gradients = model, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the model without its inner gradients."""

        def zero(outputs: Any, cotangents: Any, *rest: Any, **named: Any) -> Any:
            self.gradients += 1
            return engine(outputs, tuple(map(torch.zeros_like, cotangents)), *rest, **named)

        engine: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]  # which grad, backward and torch.func all come to
        with patch.object(torch.autograd, "_engine_run_backward", zero):
            return _logits(self.model, images)


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, logits: torch.Tensor, estimate: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(images)
        ctx.estimate = estimate
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        return ctx.estimate(ctx.saved_tensors[0].detach(), cotangents[0]), None, None


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return at_image_size(logits_of(model(images), len(images)), images)
