"""The noise of Parametric Noise Injection and Random Self-Ensemble, and averages over passes."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from gambeson.base import Number, UserError
from gambeson.models.members import Average, vote
from gambeson.models.noise import Noise, NoiseModule, standard_normal
from gambeson.models.noise_places import layers_of, put_after, put_before

Where = Literal["weight", "output", "input", "image", "weight+output", "weight+input"]
"""Where every convolution and linear layer receives noise: its weight (W), output (A-a), input (A-b), or both of
two; or the images alone (I)."""


class ParametricNoise(Noise):
    """The noise of PNI (He, Rakin, Fan, CVPR 2019): v + alpha * eta, eta ~ N(0, sd(v)^2) for each element of v."""

    kind: Literal["pni"] = "pni"
    init: Annotated[Number, Field(ge=0)] = 0.25
    """Initial alpha, one trained number per layer (the paper's)."""
    where: Where = "weight"
    """The paper recommends PNI-W."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Add noise to every convolution and linear layer."""
        names = layers_of(body, _ConvNd, nn.Linear)
        if self.where == "image":
            put_before(body, names[0], ScaledNoise(self).to(example))
            return
        for name in names:
            if "weight" in self.where:
                layer = body.get_submodule(name)
                parametrize.register_parametrization(layer, "weight", ScaledNoise(self).to(example), unsafe=True)
            if "output" in self.where:
                put_after(body, name, ScaledNoise(self).to(example))
            elif "input" in self.where:
                put_before(body, name, ScaledNoise(self).to(example))


class FixedNoise(Noise):
    """The noise of Random Self-Ensemble (Liu et al., ECCV 2018): Gaussian, of fixed size, before each convolution."""

    kind: Literal["rse"] = "rse"
    first: Annotated[Number, Field(ge=0)] = 0.2
    """Standard deviation before the first convolution, that is on the normalised images (the public script's)."""
    rest: Annotated[Number, Field(ge=0)] = 0.1
    """Standard deviation before every other convolution (the public script's)."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Insert a :class:`GaussianNoise` before every convolution."""
        for number, name in enumerate(layers_of(body, _ConvNd)):
            put_before(body, name, GaussianNoise(self.rest if number else self.first, self))


class ScaledNoise(NoiseModule):
    """Add alpha * sd(v) * N(0, 1) to a tensor v, alpha trained, sd taken over all of v and without a gradient."""

    def __init__(self, noise: ParametricNoise) -> None:
        super().__init__(noise)
        self.alpha = nn.Parameter(torch.tensor(noise.init))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Return ``v`` with noise."""
        if not self.enabled:
            return v
        drawn = standard_normal(v).to(v.dtype) * v.detach().std()
        return torch.addcmul(v, self.alpha.to(v.dtype), drawn)


class GaussianNoise(NoiseModule):
    """Add N(0, std^2)."""

    def __init__(self, std: float, noise: FixedNoise) -> None:
        super().__init__(noise)
        self.std = std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with noise."""
        if not self.enabled or self.std == 0:
            return x
        return x.add(standard_normal(x).to(x.dtype), alpha=self.std)

    def extra_repr(self) -> str:
        """Show the standard deviation when the model is printed."""
        return f"std={self.std}"


class PassAverage(nn.Module):
    """The average of a noisy model over several passes, as Random Self-Ensemble predicts.

    Args:
        model: a model with new draws in every pass.
        passes: forwards per prediction (10 is ours).
        average: how the passes are averaged; the logarithm of the mean softmax is the paper's.

    Raises:
        UserError: fewer than one pass.
    """

    def __init__(self, model: nn.Module, passes: int = 10, average: Average = "probabilities") -> None:
        super().__init__()
        if passes < 1:
            raise UserError(f"passes = {passes}: a vote needs at least one")
        self.model, self.passes, self.average = model, passes, average

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vote (N, K)."""
        return vote(torch.stack([self.model(pixels) for _ in range(self.passes)]), self.average)
