"""The universal stage: one perturbation at every eps of the curve, and eps_uni.

At each eps validation selects the most harmful perturbation: the crafted one, a control, or at the middle eps that of
the surrogate. Test only reports, so its rate has the interval of a single number; of two, where it is clear on test
that validation did not select the worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.context import AuditContext
from gambeson.auditing.cost import Speed
from gambeson.auditing.outcome import PairedDifference
from gambeson.auditing.rescoring import Perturbed, Way, asked, rescored_in, ways, worse
from gambeson.auditing.results import IoU, Restart, UniversalResult
from gambeson.auditing.stages import black_box
from gambeson.auditing.stages.transfer import name_of, on_surrogate
from gambeson.base import Config, UserError, eps_text, seeded
from gambeson.data import Dataset
from gambeson.evaluation.eps_uni import Found, eps_adv, search
from gambeson.evaluation.rates import Cost, EpsAdv, EpsUni
from gambeson.evaluation.universal import change_rate, control_rates, error_rate, patterns_of, strongest
from gambeson.tasks import Counts, Rate
from gambeson.threat import Ball
from gambeson.victim import predict, score

QUERIED_FILE = "universal-nes.safetensors"
_FIRST = 15.0
"""Seconds that a first answer is crafted for, and as many that it is scored for."""


def first_answer(context: AuditContext, speed: Speed) -> str:
    """Return in a line what a short attack does at the middle eps, for those who wait; nothing of it is kept."""
    suite, victim, eps = context.suite, context.victim, context.eps
    batch = min(16, suite.universal_batch)
    steps = min(suite.universal_steps, max(4, int(_FIRST / (batch * speed.gradient))))
    few = {"steps": steps, "batch_size": batch, "probe_starts": 0}
    asked = (victim.votes or 1) * speed.forward * (1 + len(suite.controls))
    some = context.few(min(len(context.test), max(16, int(_FIRST / asked))))
    held = context.data.validation.sample(batch, seed=context.seed)
    data = Dataset(context.data.name, context.data.train, held, some, context.data.classes)
    with seeded(context.seed, "first answer"):
        uap = suite.universal(eps, restarts=1).model_copy(update=few).craft(victim, data, seed=context.seed)
        patterns = {name: patterns_of(name, uap.ball, some.shape, context.seed)[:1] for name in suite.controls}
        found, *beside = (
            error_rate(score(predict(victim, some, delta.to(victim.device)), some))
            for delta in (uap.delta, *patterns.values())
        )
    rivals = ", ".join(f"{rate} under {name}" for name, rate in zip(patterns, beside, strict=True))
    against = f", against {rivals} and" if rivals else ", against"
    return (
        f"first answer: UER {found} at eps {eps_text(eps)} on {len(some)} test images after {steps} steps{against} "
        f"{context.clean.complement} when clean; longer attacks may find more"
    )


def file_of(eps: float) -> str:
    """File name of the perturbation of this eps."""
    return f"uap-{eps:.4g}.safetensors"


def crafted_file_of(eps: float) -> str:
    """File name of the crafted perturbation of this eps, if another one was selected."""
    return f"crafted-{eps:.4g}.safetensors"


def craft_point(context: AuditContext, eps: float, folder: Path | None) -> UniversalResult:
    """Craft the perturbation of one eps, beginning from that of the next smaller one; choose; score it on test.

    Where validation chose another than the crafted one, and that is clearly the stronger on test, it is taken after
    all: a model that knows the validation images could choose what it is judged by.
    """
    before, suite, victim = context.spent, context.suite, context.victim
    smaller = max((known for known in context.uaps if known < eps), default=None)
    crafted = _craft(context, eps, None if smaller is None else context.uaps[smaller])
    others = _others(context, eps)
    uap, _ = strongest(
        victim, context.data.validation, crafted, seed=context.seed, controls=suite.controls, others=others
    )
    predictions = _predicted(context, uap)
    found, own = score(predictions, context.test, context.predictions), None
    uer = error_rate(found)
    if uap is not crafted:
        theirs = _predicted(context, crafted)
        judged = score(theirs, context.test, context.predictions)
        own = error_rate(judged)
        if PairedDifference.of(found.counts, judged.counts).low > 0:
            uer, found, predictions = Rate.highest([uer, own]), judged, theirs
            about = crafted.about.model_copy(update={"restarts": uap.about.restarts, "chosen_on": context.test.name})
            uap = crafted = UniversalPerturbation(crafted.delta, about, crafted.image_hashes)
            own = None
        else:
            context.crafted[eps] = crafted
    context.uaps[eps] = uap
    _keep(context, eps, context.test.counts(predictions))
    if folder is not None:
        uap.save(folder / file_of(eps))
        if uap is not crafted:
            crafted.save(folder / crafted_file_of(eps))
    return UniversalResult(
        attack=uap.about.attack,
        eps=eps,
        norm=context.suite.norm,
        uer=uer,
        fooling=change_rate(found),
        iou=IoU.of(predictions, context.test),
        crafted=own,
        controls=control_rates(victim, context.test, uap.ball, context.seed, suite.controls),
        restarts=[Restart(start=kind, validation_uer=rate) for kind, rate in uap.about.restarts],
        file=file_of(eps),
        status=uap.about.status,
        cost=context.since(before),
    )


def _keep(context: AuditContext, eps: float, counts: Counts) -> None:
    context.counts[eps] = counts
    context.outcomes.keep(_name(eps), counts, context.test)


def _name(eps: float) -> str:
    return f"uer@{eps:.4g}"


def rescore(context: AuditContext) -> list[UniversalResult]:
    """Ask again under the perturbation of the middle eps in other ways; what is clearly worse counts at every eps.

    Returns:
        The points of the curve. Where a way is clearly worse, their rates are the highest of those as reported and in
        these ways, controls included, and the errors of each image those of the worst.
    """
    tried = ways(context)
    found = rescored_in(context, _stored(context, context.eps), tried)
    accused = worse(found, tried)
    points = [_worst(context, point, accused) for point in context.universal] if accused else context.universal
    return [one.model_copy(update={"rescored": found}) if one.eps == context.eps else one for one in points]


def _stored(context: AuditContext, eps: float) -> Perturbed:
    return Perturbed(split=context.test, right=context.counts[eps], delta=context.uaps[eps].delta)


def _worst(context: AuditContext, point: UniversalResult, accused: Sequence[Way]) -> UniversalResult:
    """Return the point with every rate at the worst of as reported and asked in each of the ways."""
    eps, test = point.eps, context.test
    stored = _stored(context, eps)
    predictions = [asked(context, stored, way, eps=eps) for way in accused]
    scores = [score(one, test, context.predictions) for one in predictions]
    most = max(range(len(scores)), key=lambda k: scores[k].error)
    found, update = scores[most], dict[str, object]()
    if found.error > point.uer.value:
        _keep(context, eps, found.counts)
        update = {"fooling": change_rate(found), "iou": IoU.of(predictions[most], test)}
    update["uer"] = Rate.highest([point.uer, *map(error_rate, scores)])

    def highest(reported: Rate, *deltas: torch.Tensor) -> Rate:
        again = [asked(context, replace(stored, delta=delta), way, eps=eps) for delta in deltas for way in accused]
        return Rate.highest([reported, *(error_rate(score(one, test)) for one in again)])

    if point.crafted is not None:
        update["crafted"] = highest(point.crafted, context.crafted[eps].delta)
    controls = []
    for rival in point.controls:
        patterns = patterns_of(rival.name, context.uaps[eps].ball, test.shape, context.seed)
        controls.append(rival.model_copy(update={"worst": highest(rival.worst, *patterns.split(1))}))
    return point.model_copy(update={**update, "controls": controls})


def recall(context: AuditContext, eps: float, folder: Path) -> None:
    """Load what :func:`craft_point` made for this eps when the audit ran before."""
    context.uaps[eps] = UniversalPerturbation.load(folder / file_of(eps))
    if (folder / crafted_file_of(eps)).is_file():
        context.crafted[eps] = UniversalPerturbation.load(folder / crafted_file_of(eps))
    kept = context.outcomes.of(_name(eps))
    if kept is None:
        raise UserError(f"{folder} lacks what each image answers at eps {eps_text(eps)}: delete it, and start again")
    context.counts[eps] = kept[1]


def _others(context: AuditContext, eps: float) -> list[UniversalPerturbation]:
    """More candidates: what queries alone found, in this size, and at the middle eps the surrogate's perturbation.

    A black box has such ones among its own.
    """
    others, queried = [], context.queried
    if queried is not None:
        about = queried.about.model_copy(update={"eps": eps})
        delta = Ball(eps=eps, norm=context.suite.norm).fill(queried.delta)
        others.append(UniversalPerturbation(delta, about, queried.image_hashes))
    if context.subject.black_box or eps != context.eps:
        return others
    lent = on_surrogate(context, eps)
    if lent is not None and context.surrogate is not None:
        name = f"{lent.about.attack} on surrogate ({name_of(context.surrogate)})"
        about = lent.about.model_copy(update={"attack": name})
        others.append(UniversalPerturbation(lent.delta, about, lent.image_hashes))
    return others


class Queried(Config):
    """The perturbation of the middle eps that was found by queries alone."""

    file: str = QUERIED_FILE
    cost: Cost


def craft_by_queries(context: AuditContext, folder: Path | None) -> Queried | None:
    """Craft that perturbation, which :attr:`AuditContext.queried` holds then; None if it is left out."""
    attack = context.suite.universal_nes(context.eps)
    if attack is None or context.subject.black_box:
        return None
    before = context.spent
    context.queried = attack.craft(context.victim, context.data, seed=context.seed)
    if folder is not None:
        context.queried.save(folder / QUERIED_FILE)
    return Queried(cost=context.since(before))


def _craft(context: AuditContext, eps: float, smaller: UniversalPerturbation | None) -> UniversalPerturbation:
    if context.subject.black_box:
        return black_box.craft(context, eps, None if smaller is None else (smaller.about.attack, smaller.delta))
    start, attack = None if smaller is None else smaller.delta, context.suite.universal(eps)
    crafted = attack.craft(context.victim, context.data, seed=context.seed, start=start)
    inner = context.suite.inside(eps)
    if inner is None:
        return crafted
    moved = inner.craft(context.victim, context.data, seed=context.seed, start=crafted.delta)
    starts = [*crafted.about.restarts, *((f"{kind}, inside the ball", rate) for kind, rate in moved.about.restarts)]
    best = max((crafted, moved), key=lambda one: max(rate for _, rate in one.about.restarts))
    about = best.about.model_copy(
        update={
            "restarts": starts,
            "forwards": crafted.about.forwards + moved.about.forwards,
            "backwards": crafted.about.backwards + moved.about.backwards,
        }
    )
    return UniversalPerturbation(best.delta, about, best.image_hashes)


def end_curve(context: AuditContext, left_out: Mapping[str, Exception]) -> None:
    """Let the curve end with the eps that a black box's budget, or the time, had room for.

    Raises:
        UserError: there was room for none, and why.
    """
    done, suite = len(context.universal), context.suite
    if not done:
        raise UserError(f"no perturbation was crafted: {next(iter(left_out.values()), 'the curve has no eps')}")
    if done < len(suite.eps):
        context.suite = suite.model_copy(update={"eps": tuple(point.eps for point in context.universal)})


def search_eps_uni(context: AuditContext, runs: int | None = None) -> EpsUni:
    """Search eps_uni by the attack of the curve, beginning from the curve's points; ``runs`` overrules the suite."""
    suite = context.suite

    def craft(eps: float, best: torch.Tensor | None) -> UniversalPerturbation:
        if context.subject.black_box:
            return black_box.craft(context, eps, None if best is None else ("scaled", best))
        attack = suite.universal(eps, restarts=1)  # the best so far is one more start
        return attack.craft(context.victim, context.data, seed=context.seed, start=best)

    return search(
        context.victim,
        context.data,
        craft,
        norm=suite.norm,
        delta=suite.eps_uni_delta,
        tolerance=suite.eps_uni_tolerance,
        seed=context.seed,
        known={point.eps: Found(context.uaps[point.eps], context.counts[point.eps]) for point in context.universal},
        controls=suite.controls,
        runs=suite.eps_uni_runs if runs is None else runs,
        clean=context.test.counts(context.predictions),
    )


def search_eps_adv(context: AuditContext) -> EpsAdv | None:
    """Search eps_adv by PGD with a single start, on the images that diagnostics look at; None for a black box."""
    suite = context.suite
    if context.subject.black_box or not suite.eps_adv:
        return None
    attack = context.pgd.model_copy(update={"steps": suite.pgd_steps, "restarts": 1})
    if context.subject.random:
        attack = attack.model_copy(update={"eot_samples": suite.eot_samples})
    return eps_adv(
        context.victim,
        context.sample,
        attack,
        delta=suite.eps_uni_delta,
        tolerance=max(suite.eps_uni_tolerance, _COARSE),
        seed=context.seed,
    )


_COARSE = 0.05
"""Tolerance of eps_adv, whose interval is wider on the few images of the sample."""


def rescored(context: AuditContext, uap: UniversalPerturbation) -> float:
    """Error on test of a stored perturbation, taken once more."""
    return score(_predicted(context, uap), context.test).error


def _predicted(context: AuditContext, uap: UniversalPerturbation) -> torch.Tensor:
    return predict(context.victim, context.test, uap.delta.to(context.victim.device), seed=context.seed)
