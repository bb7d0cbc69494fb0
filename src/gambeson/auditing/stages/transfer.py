"""The transfer stage: perturbations crafted on the surrogate, scored on the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gambeson.attacks import FGSM, GradientAttack, StochasticPGD, UniversalPerturbation, transfer_attack
from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import TransferredResult
from gambeson.base import derive
from gambeson.data import Split
from gambeson.evaluation.outcome import at_once, averaged
from gambeson.evaluation.universal import error_rate
from gambeson.tasks import Task
from gambeson.threat import Norm
from gambeson.victim import EOT_SAMPLES, Victim, predict, score


def image_attacks(eps: float, norm: Norm, task: Task) -> dict[str, GradientAttack]:
    """Return the per-image attacks on the surrogate: a single-step one, and an iterative one that transfers well.

    MI-FGSM with DI has the common setting of transfer papers: 10 steps of eps / 10 from the image itself, momentum 1,
    random resizing (:mod:`gambeson.attacks.gradient.pgd`). Label maps would have to be resized with their images, so
    that DI is for one label per image.
    """
    name = "mi-di-fgsm" if task.per_image_label else "mi-fgsm"
    return {"fgsm": FGSM(eps=eps, norm=norm), name: transfer_attack(name, eps=eps, norm=norm)}


class FromSurrogate:
    """An attack that always crafts on a surrogate, for comparisons of attacks.

    Args:
        surrogate: the model to craft on.
        attack: the attack.
        temperature: divisor of the surrogate's logits, see :mod:`gambeson.victim.temperature`.
        samples: samples that gradients are averaged over if the surrogate is random.
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
        task: Task | None = None,
    ) -> torch.Tensor:
        """Return perturbed images; ``model`` is not used."""
        with Victim(self.surrogate, fast=True) as source:
            source.temperature = self.temperature
            source.before_call = model.before_call if isinstance(model, Victim) else None
            attack = averaged(self.attack, source, x, self.samples)
            return attack(source, x, y, seed=seed, task=task)


def on_surrogate(context: AuditContext, eps: float) -> UniversalPerturbation | None:
    """Craft a universal perturbation on the surrogate, once per eps; None without a surrogate.

    The attack is short, because the surrogate is small and its perturbation rarely the strongest; of label maps a
    batch is as small as those of the suite.
    """
    if context.surrogate is None:
        return None
    if eps not in context.borrowed:
        batch = 32 if context.test.task.per_image_label else min(32, context.suite.universal_batch)
        attack = StochasticPGD(eps=eps, norm=context.suite.norm, steps=200, probe_starts=0, batch_size=batch)
        with Victim(context.surrogate, fast=True) as source:
            source.temperature, source.before_call = context.surrogate_temperature, context.victim.before_call
            context.borrowed[eps] = attack.craft(source, context.data, seed=context.seed)
    return context.borrowed[eps]


def measure(context: AuditContext) -> list[TransferredResult]:
    """Score perturbations crafted on the surrogate at the middle eps; empty without a surrogate."""
    surrogate, shared = context.surrogate, on_surrogate(context, context.eps)
    if surrogate is None or shared is None:
        return []
    eps, norm, test = context.eps, context.suite.norm, context.test
    found = []

    def tried(attack: str, split: Split, delta: torch.Tensor | None = None) -> None:
        before = context.spent
        moved = None if delta is None else delta.to(context.victim.device)
        predictions = predict(context.victim, split, moved, seed=context.seed)
        found.append(
            TransferredResult(
                source=f"surrogate ({name_of(surrogate)})",
                attack=attack,
                universal=delta is not None,
                eps=eps,
                norm=norm,
                error=error_rate(score(predictions, split)),
                cost=context.since(before),
            )
        )

    tried("stochastic-pgd", test, shared.delta)
    few = context.few(context.suite.transfer_images)
    for name, attack in image_attacks(eps, norm, test.task).items():
        moved = FromSurrogate(surrogate, attack, context.surrogate_temperature, context.suite.eot_samples)
        tried(name, perturbed(few, moved, context))
    return found


def name_of(surrogate: nn.Module) -> str:
    """Name of a surrogate: its architecture."""
    return str(getattr(getattr(surrogate, "card", None), "name", type(surrogate).__name__))


def perturbed(split: Split, attack: Callable[..., torch.Tensor], context: AuditContext) -> Split:
    """Return the split with every image perturbed, with the batches and seeds of the diagnostics."""
    moved = [
        attack(context.victim, images, labels, seed=derive(context.seed, "batch", k), task=split.task).cpu()
        for k, (images, labels) in enumerate(split.batches(at_once(split), device=context.victim.device))
    ]
    return split.with_images(torch.cat(moved))
