"""Learn2Perturb (Jeddi, Shafiee, Karg, Scharfenberger, Wong, CVPR 2020, arXiv 2003.01090)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Number
from gambeson.defenses.noise_injection import NoisyDefense, add_noise_for, starting
from gambeson.defenses.objective import Batch, Losses, Objective, Term, TrainContext, Weight
from gambeson.defenses.registry import register
from gambeson.models import NoiseInjection, injections
from gambeson.models.noise import FeatureNoise

Update = Literal["alternating", "joint"]
"""How a batch updates the weights W and the noise parameters theta: ``alternating`` takes a step on W with theta fixed,
then one on theta with W fixed (the paper's "alternating back-propagation"); ``joint`` takes a step on theta by the
regulariser alone, then one on both by the losses, with one momentum for theta's two steps (the released code)."""

NOISE = "noise"
"""The name of the regulariser among the terms."""


def harmonic(k: int) -> float:
    """Return H_max(k, 1) = 1 + 1/2 + ... + 1/k; the released code divides by H_0 = 0 in its first noisy epoch."""
    return sum(1 / i for i in range(1, max(k, 1) + 1))


class NoiseReward:
    """The regulariser g(theta) = -(1 / tau) * sum over all neurons of sqrt(theta), which keeps the noise up.

    Its gradient is -1 / (2 tau sqrt(theta)); tau = H_k, k epochs after the start of the noise.

    Args:
        start: maps the number of epochs to the epoch in which the noise starts.
    """

    def __init__(self, start: Callable[[int], int]) -> None:
        self.start = start

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return g(theta), summed over the model."""
        tau = harmonic(batch.epoch - self.start(batch.epochs))
        # Theta is clamped to its floor, so the root is never taken of zero; clamp passes the gradient at the floor
        # itself.
        roots = [module.theta.clamp(min=module.noise.floor).sqrt().sum() for module in feature_noise(model)]
        return -torch.stack(roots).sum() / tau


class Learn2PerturbObjective(Objective):
    """Objective of a model with learnt noise: its start, and the schedule of updates.

    Any terms can be combined with the regulariser, so that other defences can be trained with learnt noise.

    Args:
        terms: including one named ``noise``, the regulariser.
        model: a model with noise.
        start: maps the number of epochs to the epoch in which the noise starts.
        update: how a batch updates weights and noise.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[Weight, Term]],
        model: nn.Module,
        start: Callable[[int], int],
        update: Update = "alternating",
    ) -> None:
        super().__init__(terms)
        self._injections = feature_noise(model)
        self._start, self._update = start, update

    def optimizer_steps(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        """Yield the steps of a batch; before the noise starts there is one, on the weights."""
        # Depends on the batch only, so that a resumed run has the same noise as an uninterrupted one.
        on = batch.epoch >= self._start(batch.epochs)
        for module in self._injections:
            module.enabled = on
        thetas = {module.theta for module in self._injections}
        weights = set(model.parameters()) - thetas
        if not on or self._update == "alternating":
            yield self._evaluate(model, batch, self._descent, fixed=thetas), weights
        if not on:
            return
        if self._update == "alternating":
            found = self._evaluate(model, batch, list(self.terms), fixed=weights)
            # The terms are logged once, from the weights' step.
            yield {name: found[name] for name in ("loss", NOISE) if name in found}, thetas
        else:
            if self._weight(batch):
                yield self._evaluate(model, batch, [NOISE], fixed=weights), thetas
                self._hold()
            yield self._evaluate(model, batch, self._descent, fixed=set()), None
        self._hold()

    @property
    def _descent(self) -> list[str]:
        return [name for name in self.terms if name != NOISE]

    def _weight(self, batch: Batch) -> float:
        weight = self.terms[NOISE][0] if NOISE in self.terms else 0.0
        return weight(batch) if callable(weight) else weight

    def _evaluate(self, model: nn.Module, batch: Batch, names: list[str], fixed: set[nn.Parameter]) -> Losses:
        """Evaluate some of the terms, without gradients of fixed parameters."""
        flags = [(parameter, parameter.requires_grad) for parameter in fixed]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            return Objective({name: self.terms[name] for name in names}).losses(model, batch)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _hold(self) -> None:
        for module in self._injections:
            module.hold()


@register("learn2perturb", source="Jeddi et al. 2020", cost="the attack, then 2 steps")
class Learn2Perturb(NoisyDefense):
    """Minimise over W and theta E[L] + gamma * g(theta), with noise N(0, theta^2) on the features of the network.

    L is 0.5 CE(clean) + 0.5 CE(PGD), both under noise. Based on the abstract, the released code and a summary of the
    paper; settings are those of the code, for 350 epochs of SGD with Nesterov momentum at 0.1, weight decay 3e-4.
    """

    gamma: Annotated[Number, Field(ge=0)] = 1e-4
    """Weight of the regulariser; with 0, cross-entropy drives the noise to its floor."""
    init: Annotated[Number, Field(ge=0)] = FeatureNoise().init
    """Initial standard deviation of every neuron's noise."""
    floor: Annotated[Number, Field(gt=0)] = FeatureNoise().floor
    """Lower bound, enforced after each step."""
    sharing: Literal["sample", "batch"] = "sample"
    """See :class:`gambeson.models.FeatureNoise`."""
    places: tuple[str, ...] | None = None
    """See :class:`gambeson.models.FeatureNoise`."""
    noise_from: Annotated[int, Field(ge=0)] | None = None
    """Epoch from which the noise is on: 10 of 350 in the released code. None: the same share of the training (ours)."""
    adversarial_from: Annotated[int, Field(ge=0)] | None = None
    """Epoch from which the adversarial loss counts: 20 of 350 in the released code. None: the same share."""
    update: Update = "alternating"
    """How a batch updates weights and noise: :data:`Update`."""

    def noise(self) -> FeatureNoise:
        """Return the noise of the model."""
        return FeatureNoise(init=self.init, floor=self.floor, sharing=self.sharing, places=self.places)

    def noise_start(self, epochs: int) -> int:
        """Return the epoch from which the noise is on in a training of so many epochs."""
        return starting(self.noise_from, (10, 350), epochs, "noise_from")

    def adversarial_start(self, epochs: int) -> int:
        """Return the epoch from which the adversarial loss counts in a training of so many epochs."""
        return starting(self.adversarial_from, (20, 350), epochs, "adversarial_from") if self.mix else epochs

    def fully_active_epoch(self, epochs: int) -> int:
        """The epoch in which both noise and attack have started."""
        return max(self.noise_start(epochs), self.adversarial_start(epochs) if self.mix else 0)

    def terms(self) -> dict[str, tuple[Weight, Term]]:
        """The two losses and, once the noise is on, the regulariser."""

        def weight(batch: Batch) -> float:
            return self.gamma if batch.epoch >= self.noise_start(batch.epochs) else 0.0

        return {**super().terms(), NOISE: (weight, NoiseReward(self.noise_start))}

    def build_objective(self, context: TrainContext) -> Objective:
        """Return the objective, which takes one or two steps per batch.

        Raises:
            UserError: the training is too short for the noise or the adversarial loss to start.
        """
        self.noise_start(context.epochs)
        self.adversarial_start(context.epochs)
        add_noise_for(context, self.noise())
        return Learn2PerturbObjective(self.terms(), context.model, self.noise_start, self.update)


def feature_noise(model: nn.Module) -> list[NoiseInjection]:
    """Return the modules of a model with trained noise per neuron."""
    return [module for module in injections(model) if isinstance(module, NoiseInjection)]
