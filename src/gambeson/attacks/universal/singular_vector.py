"""Singular-vector universal perturbations: the direction that changes a hidden layer most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from gambeson.attacks.registry import register
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.data_free import activations, layer_names
from gambeson.base import Number, autograd_limits, generator, twice_differentiable
from gambeson.victim import Victim

Map = Callable[[torch.Tensor], torch.Tensor]
MAX_LAYERS = 5


@register("singular-vector", source="Khrulkov and Oseledets 2018", cost="64 / 128 per iteration, start and layer")
class SingularVector(UniversalAttack):
    """Universal perturbation from a (p, q)-singular vector (Khrulkov and Oseledets, CVPR 2018, arXiv 1709.03582).

    Maximises ||J v||_q over ||v||_p = 1 by Boyd's power method, J being the Jacobian of a hidden layer stacked over a
    few images; delta = eps v. The objective is even in v but the error is not, so both signs are candidates; with p =
    inf the method ends in local maxima, so the best of several starts is used for each layer. Layer and sign are
    selected on validation. No labels are used.

    Cost, for each layer: one forward of ``images``, then two backwards of them per iteration and start, and two
    forwards of validation. Defaults of q, iterations and images are those of the public codes; layers and starts ours.
    """

    name: ClassVar[str] = "singular-vector"

    layers: tuple[str, ...] = ()
    """Names of modules, as in ``model.named_modules()``; empty: convolutions and linear layers, at most five,
    evenly spaced from the first to the last."""
    q: Annotated[Number, Field(ge=1)] = 5.0
    """Norm of the layer's change."""
    p: Annotated[Number, Field(gt=1)] | None = None
    """Norm of v; None: the ball's. With another p the result is scaled to the ball."""
    iterations: Annotated[int, Field(ge=1)] = 30
    """Steps of the power method per start."""
    images: Annotated[int, Field(ge=1)] = 64
    """Training images whose Jacobians are stacked."""
    restarts: Annotated[int, Field(ge=1)] = 5
    """Random starts for each layer; the highest ||J v||_q is kept."""

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        images, _ = context.few(self.images).take(slice(None), context.device)
        p = self.p or (math.inf if self.norm == "inf" else float(self.norm))
        for k, victim in enumerate(context.edited):
            for name in self.layers or layer_names(victim.model, at_most=MAX_LAYERS):
                draw = generator(context.seed, "singular", k, name, device=context.device)
                v = self._strongest(victim, images, name, p, draw, start)
                for sign in ("+", "-"):
                    pattern = context.ball.fill(v if sign == "+" else -v) if bool(v.any()) else v
                    yield Candidate(start=f"{name} {sign}", delta=pattern)

    def _strongest(
        self,
        victim: Victim,
        images: torch.Tensor,
        layer: str,
        p: float,
        draw: torch.Generator,
        start: torch.Tensor | None,
    ) -> torch.Tensor:
        jvp, vjp = layer_maps(victim, images, layer)
        shape = (1, *images.shape[1:])
        begins = [torch.randn(shape, generator=draw, device=images.device) for _ in range(self.restarts)]
        if start is not None and bool(start.any()):
            begins.append(start)
        ends = [power_method(jvp, vjp, v, p=p, q=self.q, iterations=self.iterations) for v in begins]
        values = [float(jvp(v).norm(p=self.q)) for v in ends]
        return ends[max(range(len(values)), key=values.__getitem__)]


def layer_maps(victim: Victim, images: torch.Tensor, layer: str) -> tuple[Map, Map]:
    """Return J and its transpose, J being the layer's Jacobian at ``images`` seen as a function of one shared input.

    J v stacks J_i v over the images, J^T u sums J_i^T u_i over them. One forward serves all calls; every call costs a
    backward of the images. J v is the derivative of u -> J^T u, which is linear, so no layer needs a forward-mode rule.
    """
    with torch.enable_grad(), twice_differentiable(victim.model), autograd_limits():
        point = images.detach().requires_grad_()
        (answer,) = activations(victim, point, [layer])
        dual = torch.zeros_like(answer, requires_grad=True)
        (pulled,) = torch.autograd.grad(answer, point, dual, create_graph=True)

    def jvp(v: torch.Tensor) -> torch.Tensor:
        return victim.gradient(pulled, dual, len(images), v.expand_as(images), keep=True)

    def vjp(u: torch.Tensor) -> torch.Tensor:
        return victim.gradient(answer, point, len(images), u, keep=True).sum(0, keepdim=True)

    return jvp, vjp


def power_method(jvp: Map, vjp: Map, v: torch.Tensor, *, p: float, q: float, iterations: int) -> torch.Tensor:
    """Maximise ||J v||_q over ||v||_p = 1 (Boyd 1974): v becomes the p-dual of J^T psi_q(J v). It never decreases.

    Args:
        jvp: v to J v.
        vjp: u to J^T u.
        v: where to start.
        p: above 1, may be infinite.
        q: 1 or above, finite.
        iterations: steps; it stops early if J v is zero.
    """
    v = _dual(v, p)
    for _ in range(iterations):
        pushed = jvp(v)
        # Divided by its largest value, so that powers do not overflow.
        pushed = pushed / pushed.abs().max().clamp(min=1e-30)
        pulled = vjp(pushed.sign() * pushed.abs().pow(q - 1))
        if not bool(pulled.any()):
            return v
        v = _dual(pulled, p)
    return v


def _dual(u: torch.Tensor, p: float) -> torch.Tensor:
    """Return the v with ||v||_p = 1 that maximises <u, v>."""
    if math.isinf(p):
        return u.sign()
    u = u / u.abs().max().clamp(min=1e-30)
    v = u.sign() * u.abs().pow(1 / (p - 1))
    return v / v.norm(p=p).clamp(min=1e-30)
