"""Data-free universal perturbations (GD-UAP, FFF), which maximise the activations of hidden layers without images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.registry import register
from gambeson.attacks.solver import Adam, input_gradient
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.base import Number, UserError, generator, unknown_name
from gambeson.threat import perturb
from gambeson.victim import Victim

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layer_names(model: nn.Module, *, at_most: int | None = None, convolutions: bool = False) -> list[str]:
    """Return the names of the convolutions and linear layers, in order of their registration.

    Args:
        model: any module.
        at_most: return this many, evenly spaced from the first to the last.
        convolutions: return only convolutions, if there are any.

    Raises:
        UserError: there are none.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    if convolutions:
        found = [name for name in found if not isinstance(model.get_submodule(name), nn.Linear)] or found
    if not found:
        raise UserError("the model has no convolution and no linear layer: name the layers in layers=(...)")
    if at_most is None or len(found) <= at_most:
        return found
    last = len(found) - 1
    return [found[round(k * last / max(1, at_most - 1))] for k in range(at_most)]


def activations(victim: Victim, images: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
    """Return the outputs of the named modules for ``images``, in the order of the names, with their graph.

    Computed on the model itself, not on a fast copy, whose modules may be folded. The empty name is the model.

    Raises:
        UserError: an unknown name, a layer that is not called, or one whose output is not a tensor.
    """
    modules = dict(victim.model.named_modules())
    kept: dict[str, Any] = {}
    handles = []
    for name in names:
        if name not in modules:
            raise unknown_name("layer", name, [known for known in modules if known])

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            kept[name] = output

        handles.append(modules[name].register_forward_hook(keep))
    try:
        victim.forward_original(images)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not isinstance(kept.get(name), torch.Tensor):
            came = "nothing" if name not in kept else f"a {type(kept[name]).__name__}"
            raise UserError(f"layer {name!r} returns {came}: choose a layer that returns a tensor")
    return [kept[name] for name in names]


GREY = 0.5
"""Input in place of an image: mid-grey, which corresponds to zero in a mean-subtracted network."""
SPREAD = 0.5 / 3.29
"""Standard deviation of the range prior: 99.9 % of a Gaussian around grey are in [0, 1]."""


@register("data-free", source="Mopuri et al. 2018 (GD-UAP), 2017 (FFF)", cost="steps x 32")
class DataFree(UniversalAttack):
    """GD-UAP (Mopuri et al., arXiv 1801.08092) and FFF (arXiv 1707.05572): maximise the activations of all layers.

    Adam maximises sum_l log(||a_l(prior + delta)||^2 / 2), or for FFF sum_l log mean |a_l|. When more than half of
    delta is saturated and that share has stopped changing, delta is halved, so that the optimisation can continue.
    Every ``check_every`` steps the rate on validation is computed, and the best delta is kept; the papers do the same
    with a substitute data set. Training images are used only with ``prior="data"``, and labels not at all while
    crafting.

    Cost: a forward and a backward of ``batch_size`` images per step (of one where the prior is ``none``), and a forward
        of validation per check. The paper's rate 0.1 at eps 10 of 255 is ``rel_step_size`` = 0.01 of eps. Steps, check
        interval and patience are ours: the paper has 40,000, 400 and 10.
    """

    name: ClassVar[str] = "data-free"

    prior: Literal["none", "range", "data"] = "range"
    """Input that delta is added to: mid-grey, Gaussian noise around it, or training images."""
    objective: Literal["gd-uap", "fff"] = "gd-uap"
    """Objective: energies (GD-UAP) or mean magnitudes (FFF, whose prior is ``none``) of the activations."""
    layers: tuple[str, ...] = ()
    """Names of modules, as in ``model.named_modules()``; empty: all convolutions."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Maximum number of Adam steps."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of the prior per step."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.01
    """Adam's learning rate as a share of eps."""
    check_every: Annotated[int, Field(ge=1)] = 50
    """Steps between validation checks."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Checks without improvement after which it stops."""
    saturated: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Minimum saturated share of delta for halving."""
    settled: Annotated[Number, Field(ge=0)] = 1e-5
    """Change of that share per step below which it counts as constant."""
    rescale: bool = True
    """Halve a saturated delta (GD-UAP) to continue from; the halved delta is not a candidate."""

    @property
    def sees_train(self) -> bool:
        """Only with ``prior="data"``."""
        return self.prior == "data"

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        delta = context.ball.uniform(context.shape, generator(context.seed, "start", 0, device=context.device))
        if start is not None:
            yield Candidate(start="given", delta=start)
        yield from self._run(context, delta if start is None else start)

    def _run(self, context: CraftingContext, delta: torch.Tensor) -> Iterator[Candidate]:
        layers = [list(self.layers) or layer_names(victim.model, convolutions=True) for victim in context.victims]
        adam, samples = Adam.like(delta), self._samples(context)
        best, stale, share = -1.0, 0, 0.0
        for k in range(1, self.steps + 1):
            images = next(samples)
            with torch.enable_grad():
                point = delta.detach().requires_grad_()
                moved = perturb(images, point, "straight-through")
                values = [
                    self._excitement(activations(victim, moved, names))
                    for victim, names in zip(context.edited, layers, strict=True)
                ]
                gradient = input_gradient(context.victim, torch.stack(values).mean(), point, len(images))
            delta = context.ball.project(delta + self.rel_step_size * self.eps * adam.direction(gradient))
            before, share = share, self._saturation(context, delta)
            halve = self.rescale and share > self.saturated and abs(share - before) < self.settled
            if halve or k % self.check_every == 0 or k == self.steps:
                rate = context.rate(delta)
                stale = 0 if rate > best else stale + 1
                best = max(best, rate)
                yield Candidate(start=f"step {k}", delta=delta, rate=rate)
                if stale >= self.patience:
                    return
            if halve:
                delta, share = delta / 2, 0.0

    def _samples(self, context: CraftingContext) -> Iterator[torch.Tensor]:
        if self.prior == "data":
            for images, _ in context.stream(self.batch_size, 0):
                yield images
        grey = torch.full(context.shape, GREY, device=context.device)
        draw = generator(context.seed, "prior", device=context.device)
        while True:
            if self.prior == "none":
                yield grey
            else:
                noise = torch.randn((self.batch_size, *context.shape[1:]), generator=draw, device=context.device)
                yield (grey + SPREAD * noise).clamp(0, 1)

    def _excitement(self, answers: list[torch.Tensor]) -> torch.Tensor:
        if self.objective == "fff":
            parts = [answer.abs().mean() for answer in answers]
        else:
            parts = [answer.square().sum() / 2 for answer in answers]
        return torch.stack([part.clamp(min=1e-30).log() for part in parts]).sum()

    def _saturation(self, context: CraftingContext, delta: torch.Tensor) -> float:
        if self.norm != "inf":
            return float(context.ball.length(delta) >= 0.999 * self.eps)
        return float((delta.abs() >= 0.999 * self.eps).float().mean())
