"""The adaptive stage: attacks that do without the gradient that a model offers, where that gradient is not its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gambeson.attacks import PGD, Square
from gambeson.auditing.context import AuditContext
from gambeson.auditing.gradient_agreement import gradient_agreement
from gambeson.auditing.outcome import AsFarAsFinite, PairedDifference, clearly_more
from gambeson.auditing.results import AdaptiveResult, TransferredResult
from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.per_image import attacked_in_turn
from gambeson.data import Dataset, Split
from gambeson.evaluation import BudgetSpent
from gambeson.evaluation.outcome import ImageAttack, averaged
from gambeson.evaluation.universal import error_rate
from gambeson.tasks import Counts, Task
from gambeson.threat import norm_of_ones
from gambeson.victim import ABSTAIN, Victim, predict, score
from gambeson.victim.substitute import BorrowedGradient, FiniteDifferences, InnerGradientsOff

AGREES, WRONG = 0.9, 0.8
"""Agreement below which a gradient lacks something, and below which it is another function's (ours). Of honest
networks, quantised ones aside, 0 to 2 % of images lie below the former."""
FEW, MANY = 0.05, 0.1
"""Shares of images that may lie below them."""
_USUAL = 0.97
"""Median agreement below which attacks are tried; of honest networks 0.997 and more."""
STEPS, PROBES = 20, 10
"""Steps of an attack by finite differences, whose forwards per image are so many times the suite's queries."""
SHARED, SHARED_STEPS, SHARED_BATCH = 16, 100, 32
"""Groups of values of a universal perturbation's finite differences, which a batch averages; its steps at the most, and
images per step."""


@dataclass(frozen=True)
class OnStandIn:
    """An attack that crafts on a stand-in for the model; the images come back for whoever judges them."""

    stand_in: Callable[[nn.Module], nn.Module]
    attack: PGD

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images."""
        made = self.stand_in(model.model)
        with Victim(made) as other:
            other.temperature, other.allow_no_graph, other.before_call = model.temperature, True, model.before_call
            attack = AsFarAsFinite(averaged(self.attack, other, x))
            moved = attack(other, x, y, seed=seed, task=task)
        _count(model, other, made)
        return moved


def _count(victim: Victim, other: Victim, made: nn.Module) -> None:
    victim.forwards += other.forwards + int(getattr(made, "forwards", 0))
    victim.backwards += 0 if isinstance(made, FiniteDifferences) else other.backwards


def measure(context: AuditContext) -> AdaptiveResult | None:
    """Compare the gradient with differences along random directions; attack without it where it disagrees.

    Where it disagrees, or the model computes gradients inside its forward, what the white-box attacks leave right of
    the sample is attacked with all inner gradients off, through a copy distilled from the model's predictions (BPDA),
    by finite differences and by Square; and one perturbation is crafted without the model's gradient. Label maps are
    compared only. None for a black box.
    """
    if context.subject.black_box:
        return None
    victim, suite = context.victim, context.suite
    found = gradient_agreement(victim, context.sample, eps=context.eps, norm=suite.norm, seed=context.seed)
    decided = ~found.agreement.isnan()
    agreement, smooth = found.agreement[decided], found.smooth[decided]
    result = AdaptiveResult(
        images=len(agreement),
        median=float(agreement.median()) if len(agreement) else 1.0,
        below=int((agreement < AGREES).sum()),
        false=int(((agreement < WRONG) & smooth).sum()),
        inner=inner_gradients(context),
    )
    suspect = result.median < _USUAL or clearly_more(result.below, result.images, FEW)
    if not (suspect or result.inner) or not context.test.task.per_image_label:
        return result
    with suppress(BudgetSpent):  # where the time is over, what was found by then stays
        attacks, first = _attacks(context, result)
        settings = {name: repr(attack) for name, attack in attacks.items()}
        stronger = attacked_in_turn(context, "adaptive", len(context.sample), attacks, settings)
        ends = (0, 1) if result.inner else (first - 1, -1)  # PGD of as many steps sees the difference alone
        before, after = (stronger.rounds[k].accuracy for k in ends)
        result = result.model_copy(update={"attacked": stronger, "gain": _gain(before.value, after.value, before.n)})
        result = result.model_copy(update={"universal": _universal(context, result)})
    return result


def record(context: AuditContext, found: AdaptiveResult | None) -> None:
    """Keep the result, and let what adaptive attacks reached count like any other attack."""
    context.adaptive = found
    if found is not None and found.attacked is not None:
        context.per_image.append(found.attacked)
    if found is not None and found.universal is not None:
        context.transfer.append(found.universal)


def inner_gradients(context: AuditContext) -> int:
    """Return how many backward passes the model runs in one forward."""
    images, _ = context.sample.take(slice(0, 4), context.victim.device)
    counted = InnerGradientsOff(context.victim.model)
    with Victim(counted) as other, torch.no_grad():
        try:
            other.forward_original(images)
        except Exception:  # what divides by the norm of its gradient, say
            return counted.gradients
    return counted.gradients


def _gain(before: float, after: float, images: int) -> float:
    """The lower limit of the share of images that attacks broke beyond those that others had left."""
    right = [(torch.arange(images) < round(share * images)).long() for share in (before, after)]
    ones = torch.ones(images, dtype=torch.long)
    return PairedDifference.of(Counts(right[0], ones), Counts(right[1], ones)).low


def _attacks(context: AuditContext, found: AdaptiveResult) -> tuple[dict[str, ImageAttack], int]:
    """The white-box attacks (behind PGD that without inner gradients), then adaptive ones; the number of the former."""
    suite, eps, norm, queries = context.suite, context.eps, context.suite.norm, context.suite.queries
    attacks: dict[str, ImageAttack] = {"pgd": AsFarAsFinite(context.averaged(context.pgd))}
    usual = PGD(eps=eps, norm=norm, steps=STEPS, loss="margin", early_stop=False)
    if context.subject.random:
        usual = usual.model_copy(update={"eot_samples": suite.eot_samples})
    if found.inner:
        attacks["inner gradients off"] = OnStandIn(InnerGradientsOff, usual)
    attacks |= {name: AsFarAsFinite(attack) for name, attack in context.white_parts.items() if name not in attacks}
    first = len(attacks)
    if surrogate.choose(suite, context.data)[0] and suite.surrogate == "auto":
        copy = distilled(context)
        if copy is not None:
            attacks["distilled copy"] = OnStandIn(partial(BorrowedGradient, substitute=copy), usual)
    directions = max(1, PROBES * queries // (2 * STEPS))
    probing = usual.model_copy(
        update={
            "early_stop": True,
            "eot_samples": 1 if context.subject.random else None,  # each step draws anew
            "momentum": 0.0 if directions >= math.prod(context.test.shape) else 0.75,
        }
    )
    if queries:
        attacks["finite differences"] = OnStandIn(_differences(context, directions), probing)
    if queries and norm != "1":
        attacks["square"] = Square(eps=eps, norm=norm, queries=queries)
    return attacks, first


def _differences(context: AuditContext, directions: int) -> Callable[[nn.Module], nn.Module]:
    reach = context.eps / norm_of_ones(context.suite.norm, context.test.shape)
    step = max(1 / 255, reach / 8)  # more than a quantised model's resolution
    return partial(FiniteDifferences, directions=directions, step=step, seed=context.seed)


def distilled(context: AuditContext) -> nn.Module | None:
    """Train a surrogate on the model's own predictions for training images; None where it tells no two classes apart.

    A model that remembers queries may answer all of them alike, or abstain, once it has seen the training images.
    """
    suite, data = context.suite, context.data
    part = data.train.sample(min(suite.surrogate_images, len(data.train)), seed=context.seed)
    predictions = predict(context.victim, part, seed=context.seed)
    kept = ((predictions != ABSTAIN) & (predictions < len(part.classes))).nonzero().flatten()
    if len(predictions[kept].unique()) < 2:
        return None
    images, _ = part.take(kept, "cpu")
    answered = Split(part.name, images, predictions[kept], part.classes)
    name = surrogate.choose(suite, data)[0]
    made = Dataset(data.name, answered, data.validation, data.test, data.classes)
    victim = context.victim
    return surrogate.train_surrogate(name, suite, made, victim.device, context.seed, victim.before_call)[0].eval()


def _universal(context: AuditContext, found: AdaptiveResult) -> TransferredResult:
    """Craft one perturbation without the model's own gradient, and score it on the model."""
    before, victim, test = context.spent, context.victim, context.test
    make = InnerGradientsOff if found.inner else _differences(context, SHARED)
    made: nn.Module = make(victim.model)
    attack = context.suite.universal(context.eps, restarts=1)
    attack = attack.model_copy(
        update={"steps": min(SHARED_STEPS, attack.steps), "batch_size": SHARED_BATCH, "probe_starts": 0}
    )
    with Victim(made) as other:
        other.temperature, other.allow_no_graph, other.before_call = victim.temperature, True, victim.before_call
        uap = attack.craft(other, context.data, seed=context.seed)
    _count(victim, other, made)
    predictions = predict(victim, test, uap.delta.to(victim.device), seed=context.seed)
    return TransferredResult(
        source="the model without its inner gradients" if found.inner else "the model by finite differences",
        attack="stochastic-pgd",
        universal=True,
        eps=context.eps,
        norm=context.suite.norm,
        error=error_rate(score(predictions, test)),
        cost=context.since(before),
    )
