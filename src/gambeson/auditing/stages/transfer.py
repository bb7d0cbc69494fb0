"""The audit's transferred perturbations: crafted on a surrogate, tried on the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gambeson.attacks import FGSM, GradientAttack, StochasticPGD, UniversalPerturbation, transfer_attack
from gambeson.auditing.context import Evidence
from gambeson.auditing.results import Transferred
from gambeson.base import derive
from gambeson.data import Split
from gambeson.evaluation.outcome import at_once, averaged
from gambeson.evaluation.universal import error_rate
from gambeson.threat import Norm
from gambeson.victim import Victim, predict, score
from gambeson.victim.averaged import EOT_SAMPLES


def image_attacks(eps: float, norm: Norm) -> dict[str, GradientAttack]:
    """Return the attacks that perturb images one by one on the surrogate: one step, and many with what transfers.

    MI-FGSM with DI has the common frame of transfer papers: 10 steps of eps / 10 from the image itself, momentum 1,
    random resizing (:mod:`gambeson.attacks.gradient.transfer`).
    """
    return {"fgsm": FGSM(eps=eps, norm=norm), "mi-di-fgsm": transfer_attack("mi-di-fgsm", eps=eps, norm=norm)}


class FromSurrogate:
    """An attack that crafts on a surrogate whatever model it is given, to be used where attacks are compared.

    Args:
        surrogate: what to craft on.
        attack: how.
        temperature: what the surrogate's logits are divided by, see :mod:`gambeson.auditing.temperature`.
        samples: draws that gradients are averaged over where the surrogate is random.
    """

    def __init__(
        self, surrogate: nn.Module, attack: GradientAttack, temperature: float = 1.0, samples: int = EOT_SAMPLES
    ) -> None:
        self.surrogate, self.attack, self.temperature, self.samples = surrogate, attack, temperature, samples

    def __repr__(self) -> str:
        return f"FromSurrogate({self.attack!r})"

    def __call__(
        self,
        model: Victim | nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        ignore_index: int | None = None,
    ) -> torch.Tensor:
        """Return perturbed images; ``model`` is not looked at."""
        with Victim(self.surrogate, fast=True) as source:
            source.temperature = self.temperature
            attack = averaged(self.attack, source, x, self.samples)
            return attack(source, x, y, seed=seed, ignore_index=ignore_index)


def on_surrogate(evidence: Evidence, eps: float) -> UniversalPerturbation | None:
    """Craft one perturbation for all images on the surrogate, once an eps; None where there is no surrogate.

    The climb is short, for the surrogate is small and what it finds is seldom what the model falls to.
    """
    if evidence.surrogate is None:
        return None
    if eps not in evidence.borrowed:
        attack = StochasticPGD(eps=eps, norm=evidence.suite.norm, steps=200, screened=0, batch_size=32)
        with Victim(evidence.surrogate, fast=True) as source:
            source.temperature = evidence.surrogate_temperature
            evidence.borrowed[eps] = attack.craft(source, evidence.data, seed=evidence.seed)
    return evidence.borrowed[eps]


def measure(evidence: Evidence) -> list[Transferred]:
    """Try on the model what was crafted on the surrogate at the middle eps; nothing where there is no surrogate."""
    surrogate, shared = evidence.surrogate, on_surrogate(evidence, evidence.eps)
    if surrogate is None or shared is None:
        return []
    eps, norm, test = evidence.eps, evidence.suite.norm, evidence.test
    found = []

    def tried(attack: str, split: Split, delta: torch.Tensor | None = None) -> None:
        before = evidence.spent
        predictions = predict(evidence.victim, split, None if delta is None else delta.to(evidence.victim.device))
        found.append(
            Transferred(
                source=f"surrogate ({name_of(surrogate)})",
                attack=attack,
                universal=delta is not None,
                eps=eps,
                norm=norm,
                error=error_rate(score(predictions, split)),
                cost=evidence.since(before),
            )
        )

    tried("stochastic-pgd", test, shared.delta)
    few = evidence.few(evidence.suite.transfer_images)
    for name, attack in image_attacks(eps, norm).items():
        moved = FromSurrogate(surrogate, attack, evidence.surrogate_temperature, evidence.suite.gradient_draws)
        tried(name, perturbed(few, moved, evidence))
    return found


def name_of(surrogate: nn.Module) -> str:
    """What to call a surrogate: its architecture."""
    return str(getattr(getattr(surrogate, "card", None), "name", type(surrogate).__name__))


def perturbed(split: Split, attack: Callable[..., torch.Tensor], evidence: Evidence) -> Split:
    """Return the split with every image perturbed, by the same batches and seeds as diagnostics take."""
    moved = [
        attack(
            evidence.victim, images, labels, seed=derive(evidence.seed, "batch", k), ignore_index=split.ignore_index
        ).cpu()
        for k, (images, labels) in enumerate(split.batches(at_once(split), device=evidence.victim.device))
    ]
    return Split(split.name, torch.cat(moved), split.labels, split.classes, split.ignore_index)
