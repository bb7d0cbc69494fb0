"""Noise inside models, in training and at inference; here the learnt feature noise of Learn2Perturb.

Parametric Noise Injection and the noise of Random Self-Ensemble are in :mod:`gambeson.models.noisy_weights`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Config, Number, UserError
from gambeson.models.noise_places import feature_shapes, places_of, put_after, put_before

_CHUNK = 2**17  # normals per seed: half a megabyte, which fits a core's cache


class Noise(Config):
    """Base of every noise; stored in a model's card, so that a saved model can be rebuilt."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Insert the noise into a body without noise, in place.

        Args:
            body: takes normalised images.
            example: (1, C, H, W) of them, on the body's device, to determine feature shapes.

        Raises:
            UserError: the body has no layer for it.
        """
        raise NotImplementedError


class NoiseModule(nn.Module):
    """Base of every module that draws noise: in training and in evaluation mode, unless ``enabled`` is False.

    Draws come from torch's global generator, as dropout's do.
    """

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise
        self.enabled = True

    @property
    def learnt(self) -> list[nn.Parameter]:
        """The trained noise parameters."""
        return list(self.parameters(recurse=False))


class FeatureNoise(Noise):
    """The noise of Learn2Perturb (Jeddi et al. 2020): every neuron has its own trained standard deviation."""

    kind: Literal["learn2perturb"] = "learn2perturb"
    init: Annotated[Number, Field(ge=0)] = 0.25
    """Initial standard deviation of every neuron (the released code's)."""
    floor: Annotated[Number, Field(gt=0)] = 0.01
    """Lower bound of the trained standard deviations (the released code's)."""
    sharing: Literal["sample", "batch"] = "sample"
    """Independent draws per image (our default), or one draw per batch (the released code's, with which averaging over
    copies in one forward has no effect)."""
    places: tuple[str, ...] | None = None
    """Names of the modules whose output receives the noise. None: in a residual network before the first ReLU and
    before the last one of each block, as in the paper; elsewhere after each convolution with the normalisation and
    pooling that follow it, before the activation, but for one that gives the logits of label maps (ours: the paper
    has residual networks only)."""

    def insert(self, body: nn.Module, example: torch.Tensor) -> None:
        """Put a :class:`NoiseInjection` at every place."""
        before, after = ([], list(self.places)) if self.places is not None else places_of(body, example)
        shapes = feature_shapes(body, before, after, example)
        for names, put in ((before, put_before), (after, put_after)):
            for name in names:
                put(body, name, NoiseInjection(shapes[name], self).to(example))


class NoiseInjection(NoiseModule):
    """Add N(0, theta^2) to features (N, C, H, W), theta a trained value for each neuron (C, H, W)."""

    noise: FeatureNoise

    def __init__(self, shape: tuple[int, ...], noise: FeatureNoise) -> None:
        super().__init__(noise)
        self.theta = nn.Parameter(torch.full(shape, noise.init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features with noise.

        Raises:
            UserError: the features have another shape than theta.
        """
        if not self.enabled:
            return x
        if x.shape[1:] != self.theta.shape:
            raise UserError(
                f"features of shape {tuple(x.shape[1:])} do not fit noise made for {tuple(self.theta.shape)}: "
                "send images of the size that the noise was made for"
            )
        drawn = standard_normal(x if self.noise.sharing == "sample" else x[:1]).to(self.theta.dtype)
        theta = self.theta.unsqueeze(0)
        if x.ndim == 4 and x.stride(1) == 1:
            theta = theta.contiguous(memory_format=torch.channels_last)  # as x is; another layout is six times slower
        if x.dtype == theta.dtype:
            return torch.addcmul(x, theta, drawn)  # one pass instead of the two of x + theta * drawn
        return x + (theta * drawn).to(x.dtype)

    @torch.no_grad()
    def hold(self) -> None:
        """Clamp theta to its floor."""
        self.theta.clamp_(min=self.noise.floor)


def inject_noise(body: nn.Module, noise: Noise, example: torch.Tensor) -> None:
    """Insert noise into a body, in place and once.

    Args:
        body: takes normalised images.
        noise: which.
        example: (1, C, H, W) of them, to determine feature shapes.

    Raises:
        UserError: the body has no layer for it, or has another noise.
    """
    carried = injections(body)
    if carried and carried[0].noise != noise:
        raise UserError(
            f"the model carries {carried[0].noise} already: give the same settings, or start from a model without noise"
        )
    if not carried:
        weight = next(body.parameters(), None)
        noise.insert(body, example if weight is None else example.to(weight))
        body.fixed_size = True  # type: ignore[assignment]  # the noise fits features of one size


def injections(model: nn.Module) -> list[NoiseModule]:
    """Return every noise module of a model, in order."""
    return [module for module in model.modules() if isinstance(module, NoiseModule)]


@contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """Switch a model's noise off inside the block, and restore every switch."""
    switches = [(module, module.enabled) for module in injections(model)]
    try:
        for module, _ in switches:
            module.enabled = False
        yield
    finally:
        for module, enabled in switches:
            module.enabled = enabled


def standard_normal(like: torch.Tensor) -> torch.Tensor:
    """Draw N(0, 1) in float32 (whatever the precision of the rest is), in the shape and on the device of ``like``.

    On a CPU torch fills a tensor with one thread, which for a small residual network takes a fifth of the time of
    two-threaded training. Large draws are therefore split into parts of fixed size, each with its own seed from torch's
    global generator, and filled by all of torch's threads; the values do not depend on their number.
    """
    total = like.numel()
    # This code cannot be traced or batched; torch.randn is used there, with vmap's randomness rules.
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if like.device.type != "cpu" or transformed or total <= _CHUNK:
        return torch.randn_like(like, dtype=torch.float32)
    drawn = torch.empty_like(like, dtype=torch.float32)  # channels last if the features are
    parts = list(drawn.as_strided((total,), (1,)).split(_CHUNK))
    seeds = torch.randint(2**63 - 1, (math.ceil(total / _CHUNK),)).tolist()
    threads = min(torch.get_num_threads(), len(parts))

    def fill(first: int) -> None:
        source = torch.Generator()
        for part, seed in zip(parts[first::threads], seeds[first::threads], strict=True):
            part.normal_(generator=source.manual_seed(seed))

    helpers = [threading.Thread(target=fill, args=(number,), daemon=True) for number in range(1, threads)]
    for helper in helpers:
        helper.start()
    fill(0)
    for helper in helpers:
        helper.join()
    return drawn
