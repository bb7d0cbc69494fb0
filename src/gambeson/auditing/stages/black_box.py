"""Black boxes in audits: budget, recognition on resuming, and universal attacks without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from gambeson.attacks import GaborNoise, PerlinNoise, UniversalPerturbation
from gambeson.attacks.universal.procedural import ProceduralAttack
from gambeson.auditing.budget import BudgetPlan, fit_queries, listed
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.stages.transfer import name_of, on_surrogate
from gambeson.auditing.suite import Suite
from gambeson.base import UserError, generator
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.models import fingerprint
from gambeson.threat import Ball
from gambeson.victim import Victim, predict, score

_ALIKE = 1e-3
"""Scores that differ by less than this share of their range are equal, because servers round and batch differently."""
_FINALISTS = 3
QUERIES = "state/queries.json"
"""File of the number of queries, in the folder of an audit."""


def queries_file(folder: Path) -> Path:
    """Return the file with the number of images a black box was queried with."""
    return folder / QUERIES


def recognise(box: BlackBox, data: Dataset, stages: Checkpoints, folder: Path | None, *, random: bool) -> None:
    """Query a few fixed images, so that another box under the same name is detected.

    The scores become the box's fingerprint; the first ones are kept as long as new ones agree. A random box is not
    queried, and is identified by its name only.

    Raises:
        UserError: the folder contains the audit of a box with other scores.
    """
    if random:
        return
    shape = data.test.shape
    grey = torch.linspace(0, 1, 4).view(-1, 1, 1, 1).expand(-1, *shape)
    noise = torch.rand(4, *shape, generator=generator(0, "probe"))
    own = data.test.take(slice(0, 8), "cpu")[0]
    now = box.recognise(torch.cat([grey, noise, own]))
    before = torch.tensor(stages.do("probe", list[list[float]], lambda: now.tolist()))
    spread = float(before.max() - before.min())
    if before.shape != now.shape or float((before - now).abs().max()) > _ALIKE * max(spread, 1e-6):
        raise UserError(
            f"{folder} holds the audit of another model: {box.title} answers otherwise than it did; choose another "
            "--out"
        )
    box.answers = before


def inspect(
    victim: Victim,
    box: BlackBox,
    suite: Suite,
    data: Dataset,
    stages: Checkpoints,
    folder: Path | None,
    *,
    keep_eps: bool = False,
    choose: Callable[[Suite], Suite] | None = None,
) -> tuple[Suite, Dataset, list[str]]:
    """Set the budget of a box, recognise it, and reduce the audit to fit the budget.

    Args:
        victim: the box, inside its context.
        box: the same.
        suite: the requested suite.
        data: the data; of its validation split as much is kept as one choice among perturbations looks at.
        stages: of the audit.
        folder: of the audit.
        keep_eps: see :func:`gambeson.auditing.budget.fit_queries`.
        choose: reduces the suite further, to what fits the time.

    Returns:
        The reduced suite and data, and the reductions as sentences.
    """
    if suite.class_wise:
        raise UserError(f"class-wise perturbations need gradients, and {box.title} is a black box: leave them out")
    box.hold(suite.budget, None if folder is None else queries_file(folder))
    random = victim.inspect(data.test.take(slice(0, 8), victim.device)[0], scores=True).stochastic
    recognise(box, data, stages, folder, random=random)
    room, votes = None if suite.budget is None else suite.budget - box.asked, suite.votes if random else 1
    plan = stages.do("plan", BudgetPlan, lambda: fit_queries(suite, data, room, votes, keep_eps=keep_eps))
    planned = plan.suite.model_copy(update={"budget": suite.budget})  # which may have been raised since
    suite = planned if choose is None else choose(planned)
    held = data.validation.sample(suite.pattern_images)
    return suite, Dataset(data.name, data.train, held, data.test, data.classes), list(plan.notes)


def left_out(parts: Sequence[str], budget: int | None) -> str:
    """Return the sentence on what a budget left out; empty if nothing was."""
    if not parts:
        return ""
    return f"The budget of {budget} images left out {listed(parts)}."


def remarks(model: nn.Module, suite: Suite) -> list[str]:
    """Limits of the audit of a black box by a suite, as sentences; empty for a model with gradients."""
    if not isinstance(model, BlackBox):
        return []
    words = ["A black box: attacks that need gradients were left out, so that true robustness may be lower."]
    if model.decides_only and suite.queries:
        words.append(
            "Only the top class came back: Square then knows hits and misses and not how near it is, and finds less "
            "than it does with scores."
        )
    return words


def pattern_attacks(suite: Suite, eps: float) -> list[ProceduralAttack]:
    """Return the procedural attacks at one eps, each with the suite's number of patterns."""
    ball = {"eps": eps, "norm": suite.norm}
    size = {"patterns": suite.patterns, "images": suite.pattern_images, "finalists": min(_FINALISTS, suite.patterns)}
    return [kind(**ball, **size) for kind in (PerlinNoise, GaborNoise)]


def craft(context: AuditContext, eps: float, start: tuple[str, torch.Tensor] | None = None) -> UniversalPerturbation:
    """Return the strongest of several universal attacks without gradients, selected on validation.

    They are Perlin and Gabor noise, searched by queries; stochastic PGD on the surrogate, if there is one; and a
    perturbation of another eps, scaled to this one.

    Args:
        context: of the audit.
        eps: the radius.
        start: the attack of the perturbation of another eps, and that perturbation (1, C, H, W).
    """
    victim, suite, validation = context.victim, context.suite, context.data.validation
    spent = victim.forwards

    def validation_error(delta: torch.Tensor) -> float:
        return score(predict(victim, validation, delta.to(victim.device), seed=context.seed), validation).error

    found: list[tuple[str, UniversalPerturbation, float]] = []
    attacks = pattern_attacks(suite, eps)
    if isinstance(victim.model, BlackBox):  # where an interrupted audit has asked in vain, ask no more in vain
        victim.model.afford((victim.votes or 1) * sum(attack.asked(context.data) for attack in attacks))
    for attack in attacks:
        uap = attack.craft(victim, context.data, seed=context.seed)
        found.append((uap.about.attack, uap, max(rate for _, rate in uap.about.restarts)))
    if context.surrogate is not None and (borrowed := on_surrogate(context, eps)) is not None:
        mixed = borrowed.about.model_copy(update={"model": f"{borrowed.about.model}+{fingerprint(victim.model)}"})
        name = f"{mixed.attack} on surrogate ({name_of(context.surrogate)})"
        lent = UniversalPerturbation(borrowed.delta, mixed, borrowed.image_hashes)
        found.append((name, lent, validation_error(borrowed.delta)))
    if start is not None and bool(start[1].any()):
        delta = Ball(eps=eps, norm=suite.norm).fill(start[1]).cpu()
        about = found[0][1].about.model_copy(update={"status": "done"})
        found.append((start[0], UniversalPerturbation(delta, about, found[0][1].image_hashes), validation_error(delta)))
    name, best, _ = max(found, key=lambda entry: entry[2])
    about = best.about.model_copy(
        update={
            "attack": name,
            "restarts": [(kind, rate) for kind, _, rate in found],
            "chosen_on": validation.name,
            "forwards": victim.forwards - spent,
        }
    )
    return UniversalPerturbation(best.delta, about, best.image_hashes)
