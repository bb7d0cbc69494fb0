"""eps_uni(delta) and eps_adv(delta): the smallest eps at which an attack reaches the error delta, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks import CONTROLS, GradientAttack, UniversalAttack, UniversalPerturbation
from gambeson.attacks.universal.target import from_predictions
from gambeson.base import Config, Number, UserError, derive, seeded, unknown_name
from gambeson.data import Dataset, Split, as_dataset, as_split, disjoint
from gambeson.evaluation.bisection import Bisection
from gambeson.evaluation.outcome import at_once, attacked, averaged
from gambeson.evaluation.rates import Cost, EpsAdv, EpsUni, Measured
from gambeson.evaluation.targeted import TargetMeasure
from gambeson.evaluation.universal import RANKED, Measure, errors_under, lost_iou, strongest
from gambeson.tasks import Counts
from gambeson.threat import Ball, Norm, norm_of_ones, perturb
from gambeson.victim import Victim, as_victim, nothing_counts, rescaled, vote

Craft = Callable[[float, torch.Tensor | None], UniversalPerturbation]
"""Maps eps, and the best perturbation so far (1, C, H, W) scaled to it, to a perturbation of this eps."""


class EpsSearch(Config):
    """What a search is to reach, and how closely."""

    delta: Number
    tolerance: Annotated[Number, Field(gt=0)]


@dataclass(frozen=True)
class Found:
    """The selected perturbation at one eps."""

    uap: UniversalPerturbation
    """The perturbation selected on validation."""
    test: Measured
    """What it does to test."""


def eps_uni(
    model: nn.Module | Victim,
    data: object,
    attack: UniversalAttack,
    *,
    delta: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
    known: Iterable[UniversalPerturbation] = (),
    controls: Sequence[str] = tuple(CONTROLS),
    measure: Literal["error", "mean-iou"] | Measure | None = None,
) -> EpsUni:
    """Search the smallest eps at which one perturbation reaches an error of ``delta`` (Mummadi et al. 2019, section 3).

    eps is doubled until the perturbation selected at it reaches an error of ``delta`` on the test split, then the
    bracket is halved until it is narrower than ``tolerance`` times eps, or than a millionth of the largest eps. At each
    eps validation selects the most harmful among the perturbation crafted on train, the perturbations of earlier eps
    scaled to this one, from the best of which the attack also starts, and the controls. Balls are nested: a success at
    eps counts for every larger one. eps_uni is thus the minimum over everything tried, and an upper bound.

    Test images select nothing; they show where the error crosses ``delta``. The interval is a bootstrap over them with
    the perturbations held fixed (:func:`gambeson.evaluation.rates.crossing_interval`). To measure the error curve
    there, the perturbation found is scaled to up to twelve eps around it, which costs only forwards; a scaled one that
    succeeds at a smaller eps counts. A bracket that is still wide is halved by those at its ends, scaled.

    A random model is judged by votes (:data:`gambeson.victim.DEFAULT_VOTES`), whether a module or a victim is given.

    Args:
        model: any module from pixels to logits, or an entered :class:`Victim`.
        data: a data set, or what can be split into one.
        attack: any universal attack; its own eps is replaced.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the attack, the controls and the bootstrap.
        known: existing perturbations for this model, in the norm of the attack; of several of one eps that with the
            largest error on validation. Test images that one was crafted on are left out.
        controls: names of the controls tried at each eps.
        measure: what has to reach ``delta``: ``error``; ``mean-iou``, one minus the mean IoU, of label maps; or a
            function, such as :class:`gambeson.evaluation.TargetMeasure`. By default the error, or what a target of the
            attack reaches.

    Returns:
        The smallest success; right-censored if there is none even for the whole box.

    Raises:
        UserError: another kind of attack, an unknown measure, no such delta or tolerance, a delta that clean images
            reach of a target, or a perturbation of another norm.
    """
    if not isinstance(attack, UniversalAttack):
        raise UserError(
            f"eps_uni takes a universal attack such as gb.attacks.StochasticPGD, got {type(attack).__name__}"
        )
    goal = EpsSearch(delta=delta, tolerance=tolerance)
    known = list(known)
    for uap in known:
        if not isinstance(uap, UniversalPerturbation):
            raise UserError(f"a known perturbation is a {type(uap).__name__}: expected a UniversalPerturbation")
    whole = as_dataset(data)
    dataset, target = disjoint(whole), getattr(attack, "target", None)
    to = getattr(attack, "temperature", 1.0)
    with as_victim(model) as victim, rescaled([victim], to, dataset.validation, seed):
        measured = measure_of("error" if measure is None else measure)
        if measure is None and target is not None:
            labels = "prediction" if from_predictions(attack.plain()) else "truth"
            measured = TargetMeasure.of(victim, whole.validation, target, labels, seed=seed)
            if (reached := measured(victim, dataset.test, None).error) >= goal.delta:
                raise UserError(
                    f"delta = {goal.delta:g}, but clean images reach target {target} by {reached:.4g} already: "
                    "expected more"
                )

        def craft(eps: float, start: torch.Tensor | None) -> UniversalPerturbation:
            return attack.model_copy(update={"eps": eps}).craft(victim, dataset, seed=seed, start=start)

        before = Cost(forwards=victim.forwards, backwards=victim.backwards)
        for uap in known:
            if uap.about.norm != attack.norm:
                raise UserError(f"a known perturbation is of norm {uap.about.norm}: expected {attack.norm}")
            test = uap.held_out(dataset.test)  # none is judged by what it was crafted on
            dataset = replace(dataset, test=test) if len(test) < len(dataset.test) else dataset
        found: dict[float, Found] = {}
        most: dict[float, float] = {}
        for uap in known:
            eps, pattern = uap.about.eps, uap.delta.to(victim.device)
            error = measured(victim, dataset.validation, pattern).error
            if error > most.get(eps, -1.0):
                most[eps], found[eps] = error, Found(uap, measured(victim, dataset.test, pattern))
        result = search(
            victim,
            dataset,
            craft,
            norm=attack.norm,
            delta=goal.delta,
            tolerance=goal.tolerance,
            seed=seed,
            known=found,
            controls=controls,
            measure=measured,
        )
        return result.model_copy(update={"cost": _since(victim, before)})


def search(
    victim: Victim,
    data: Dataset,
    craft: Craft,
    *,
    norm: Norm,
    delta: float,
    tolerance: float,
    seed: int = 0,
    known: Mapping[float, Found] | None = None,
    controls: Sequence[str] = tuple(CONTROLS),
    runs: int | None = None,
    clean: Measured | None = None,
    measure: Measure = errors_under,
) -> EpsUni:
    """As :func:`eps_uni`, for any function that crafts a perturbation of a given eps.

    Args:
        victim: the model, inside its context; its ``votes`` is the number of votes.
        data: validation selects, test reports.
        craft: the attack.
        norm: of its ball.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the controls and the bootstrap.
        known: existing perturbations by eps.
        controls: names of controls that are tried at each eps.
        runs: maximum number of calls of ``craft``, after which the bracket is not narrowed further. 0: eps_uni is read
            off ``known``.
        clean: what is measured on clean test images, if known.
        measure: what has to reach ``delta``; the error.
    """
    before = Cost(forwards=victim.forwards, backwards=victim.backwards)
    few = data.validation.sample(RANKED, seed=seed)

    def measured(split: Split, delta: torch.Tensor) -> Measured:
        return measure(victim, split, delta.to(victim.device))

    def attempt(eps: float, tried: Mapping[float, Found]) -> Found:
        earlier = [scaled(found.uap, eps) for found in tried.values() if bool(found.uap.delta.any())]
        best = max(earlier, key=lambda uap: measured(few, uap.delta).error, default=None)
        uap = craft(eps, None if best is None else best.delta)
        others = [] if best is None else [best]
        chosen, _ = strongest(
            victim, data.validation, uap, seed=seed, controls=controls, others=others, measure=measure
        )
        return Found(chosen, measured(data.test, chosen.delta))

    def rescale(found: Found, eps: float) -> Measured:
        return measured(data.test, scaled(found.uap, eps).delta)

    work = Bisection(
        attempt=attempt,
        errors=lambda found: found.test,
        rescale=rescale,
        clean=measure(victim, data.test, None) if clean is None else clean,
        largest=norm_of_ones(norm, data.test.shape),
        delta=delta,
        tolerance=tolerance,
        tried=dict(known or {}),
        runs=math.inf if runs is None else runs,
        seed=seed,
        title=f"  eps_uni({delta:g})",
    )
    return EpsUni(**work.run(), measure=_name(measure), cost=_since(victim, before))


def eps_adv(
    model: nn.Module | Victim,
    data: object,
    attack: GradientAttack,
    *,
    delta: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
) -> EpsAdv:
    """Search the smallest eps at which a per-image attack reaches an error of ``delta``.

    To compare with :func:`eps_uni` (Mummadi et al. 2019): it is never larger, up to the weakness of the attacks. An
    image broken at some eps counts as broken at every larger one. The worst case is decided per image, so no attack is
    selected and the interval is that of a single number.

    Args:
        model: any module from pixels to logits, or an entered :class:`Victim`.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        attack: any gradient attack; its own eps is replaced. On a random model it averages over
            :data:`gambeson.victim.averaged.EOT_SAMPLES` samples unless it sets a number.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the attack and the bootstrap.

    Raises:
        UserError: another kind of attack, no such delta or tolerance, or no label of the split counts.
    """
    split = as_split(data, "test")
    if not isinstance(attack, GradientAttack):
        raise UserError(f"eps_adv takes a gradient attack such as gb.attacks.PGD, got {type(attack).__name__}")
    goal = EpsSearch(delta=delta, tolerance=tolerance)
    if not bool(split.task.valid(split.labels).any()):
        raise nothing_counts(split)
    with as_victim(model) as victim:
        before = Cost(forwards=victim.forwards, backwards=victim.backwards)
        attack = averaged(attack, victim, split.take(slice(0, 8), victim.device)[0])
        work = Bisection(
            attempt=lambda eps, tried: _attacked(victim, split, attack, eps, tried, seed),
            errors=lambda found: found[1],
            rescale=lambda found, eps: _moved_counts(victim, split, found[0] * (eps / found[2])),
            clean=(clean := errors_under(victim, split)),
            largest=norm_of_ones(attack.norm, split.shape),
            delta=goal.delta,
            tolerance=goal.tolerance,
            tried={},
            runs=math.inf,
            seed=seed,
            title=f"  eps_adv({goal.delta:g})",
        )
        return EpsAdv(**work.run(), images=clean.images, cost=_since(victim, before))


def scaled(uap: UniversalPerturbation, eps: float) -> UniversalPerturbation:
    """Return a perturbation scaled to norm ``eps``."""
    delta = Ball(eps=eps, norm=uap.about.norm).fill(uap.delta)
    return UniversalPerturbation(delta, uap.about.model_copy(update={"eps": eps, "status": "done"}), uap.image_hashes)


def _since(victim: Victim, before: Cost) -> Cost:
    return Cost(forwards=victim.forwards, backwards=victim.backwards) - before


MEASURES: dict[str, Measure] = {"error": errors_under, "mean-iou": lost_iou}
"""Measures of :func:`eps_uni` by name."""


def measure_of(measure: str | Measure) -> Measure:
    """Return a measure by name, or what is one.

    Raises:
        UserError: no measure has this name.
    """
    if callable(measure):
        return measure
    if not isinstance(measure, str) or measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    return MEASURES[measure]


def _name(measure: Measure) -> str:
    names = {known: name for name, known in MEASURES.items()}
    return names.get(measure) or str(getattr(measure, "name", getattr(measure, "__name__", type(measure).__name__)))


PerImageFound = tuple[torch.Tensor, Counts, float]
"""Each image's worst perturbation (N, C, H, W), its answers, and the eps of the attack."""


def _attacked(
    victim: Victim,
    split: Split,
    attack: GradientAttack,
    eps: float,
    tried: Mapping[float, PerImageFound],
    seed: int,
) -> PerImageFound:
    """Attack each image at ``eps``; an image keeps the perturbation of a smaller eps that did more harm."""
    smaller = max((known for known in tried if known < eps), default=None)
    here = attack.model_copy(update={"eps": eps})
    moves = []
    with seeded(seed, "eps_adv", f"{eps:.9g}"):
        for k, (images, labels) in enumerate(split.batches(at_once(split), device=victim.device)):
            moved = attacked(here, victim, images, labels, seed=derive(seed, "batch", k), task=split.task)
            moves.append((moved - images).cpu())
    delta = torch.cat(moves)
    counts = _moved_counts(victim, split, delta)
    if smaller is None:
        return delta, counts, eps
    before, known, _ = tried[smaller]
    worse = counts.right <= known.right
    best = torch.where(worse.view(-1, 1, 1, 1), delta, before)
    return best, Counts(torch.minimum(counts.right, known.right), counts.total), eps


def _moved_counts(victim: Victim, split: Split, delta: torch.Tensor) -> Counts:
    """Answers under one perturbation per image (N, C, H, W), by votes if the model is random."""
    size, at, found = at_once(split), 0, []
    with seeded(0, "score"):
        for images, _ in split.batches(size, device=victim.device):
            found.append(vote(victim, perturb(images, delta[at : at + len(images)].to(images))).cpu())
            at += len(images)
    return split.counts(torch.cat(found))
