"""Feature noise with a learnt size, at training and at inference (Learn2Perturb, Jeddi et al. 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Config, Number, UserError


class Noise(Config):
    """Which noise a model carries; stored in its card."""

    kind: Literal["learn2perturb"] = "learn2perturb"
    init: Annotated[Number, Field(ge=0)] = 0.25
    """Standard deviation at the start, of every neuron (the released code's)."""
    floor: Annotated[Number, Field(ge=0)] = 0.01
    """The least a trained standard deviation may become."""
    sharing: Literal["sample", "batch"] = "sample"
    """Every image has draws of its own (our default), or one draw serves a whole batch (the released code's, which
    makes averaging over copies in one forward useless)."""


class NoiseInjection(nn.Module):
    """Add N(0, theta^2) to features (N, C, H, W), theta a trained value for each neuron (C, H, W).

    Draws come from torch's global generator, as dropout's do. They are made in training and in evaluation mode;
    ``enabled = False`` turns them off.
    """

    def __init__(self, shape: tuple[int, ...], noise: Noise) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full(shape, noise.init))
        self.noise = noise
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features with noise."""
        if not self.enabled:
            return x
        drawn = torch.randn_like(x if self.noise.sharing == "sample" else x[:1])
        return x + self.theta * drawn

    @torch.no_grad()
    def hold(self) -> None:
        """Bring theta back to its floor."""
        self.theta.clamp_(min=self.noise.floor)


def add_noise(body: nn.Module, noise: Noise, example: torch.Tensor) -> None:
    """Put noise into a body, in place: after the stem's first BatchNorm and after every residual addition.

    Args:
        body: a residual network with ``relu1`` after its first BatchNorm and blocks whose ``relu2`` sees the sum.
        noise: which.
        example: (1, C, H, W) normalised, to see the features' shapes.

    Raises:
        UserError: the body has no such places.
    """
    places = [name for name, module in body.named_modules() if isinstance(module, nn.ReLU) and _is_place(name)]
    if not places:
        raise UserError(
            f"{type(body).__name__} has no place for feature noise (a ReLU after the stem's BatchNorm or after a "
            "residual addition): choose a residual network such as resnet20"
        )
    shapes = _shapes(body, places, example)
    for name in places:
        body.set_submodule(name, nn.Sequential(NoiseInjection(shapes[name], noise), body.get_submodule(name)))


def injections(model: nn.Module) -> list[NoiseInjection]:
    """Return every noise module of a model, in order."""
    return [module for module in model.modules() if isinstance(module, NoiseInjection)]


def _is_place(name: str) -> bool:
    return name == "relu1" or name.endswith(".relu2")


def _shapes(body: nn.Module, places: list[str], example: torch.Tensor) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = tuple(inputs[0].shape[1:])

        return body.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in places]
    mode = body.training
    try:
        with torch.no_grad():
            body.eval()(example)
    finally:
        body.train(mode)
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    return found
