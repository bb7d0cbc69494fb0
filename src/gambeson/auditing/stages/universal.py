"""The audit's universal perturbations: one at every eps of the curve, and the smallest eps that is enough.

For each eps stands the perturbation that does most harm on validation: the crafted one, a control, or at the middle
eps the one of the surrogate. Validation chooses, test reports: the interval of its rate is that of one number.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.context import Evidence
from gambeson.auditing.results import Restart, Universal
from gambeson.auditing.stages import black_box
from gambeson.auditing.stages.transfer import name_of, on_surrogate
from gambeson.base import UserError, load_tensors, save_tensors
from gambeson.evaluation.bootstrap import ImageErrors
from gambeson.evaluation.eps_uni import Found, eps_adv, search
from gambeson.evaluation.rates import EpsAdv, EpsUni
from gambeson.evaluation.universal import change_rate, control_rates, error_rate, strongest
from gambeson.victim import predict, score


def file_of(eps: float) -> str:
    """Name of the file that the perturbation of this eps is kept in."""
    return f"uap-{eps:.4g}.safetensors"


def crafted_file_of(eps: float) -> str:
    """Name of the file of the crafted perturbation of this eps, where another one took its place."""
    return f"crafted-{eps:.4g}.safetensors"


def _errors_file(folder: Path, eps: float) -> Path:
    return folder / "state" / f"errors-{eps:.4g}.safetensors"


def craft_point(evidence: Evidence, eps: float, folder: Path | None) -> Universal:
    """Craft the perturbation of one eps, beginning from that of the next smaller one; choose; score it on test."""
    before, suite, victim = evidence.spent, evidence.suite, evidence.victim
    smaller = max((known for known in evidence.uaps if known < eps), default=None)
    crafted = _craft(evidence, eps, None if smaller is None else evidence.uaps[smaller])
    borrowed = _borrowed(evidence, eps)
    uap, _ = strongest(
        victim, evidence.data.validation, crafted, seed=evidence.seed, controls=suite.controls, others=borrowed
    )
    evidence.uaps[eps] = uap
    own = None
    if uap is not crafted:
        evidence.crafted[eps] = crafted
        own = error_rate(score(_predicted(evidence, crafted), evidence.test))
    predictions = _predicted(evidence, uap)
    found, errors = score(predictions, evidence.test, evidence.predictions), ImageErrors.of(predictions, evidence.test)
    evidence.errors[eps] = errors
    if folder is not None:
        uap.save(folder / file_of(eps))
        if uap is not crafted:
            crafted.save(folder / crafted_file_of(eps))
        save_tensors(_errors_file(folder, eps), {"wrong": errors.wrong, "answers": errors.answers}, {})
    return Universal(
        attack=uap.about.attack,
        eps=eps,
        norm=evidence.suite.norm,
        uer=error_rate(found),
        fooling=change_rate(found),
        crafted=own,
        controls=control_rates(victim, evidence.test, uap.ball, evidence.seed, suite.controls),
        restarts=[Restart(start=kind, validation_uer=rate) for kind, rate in uap.about.restarts],
        file=file_of(eps),
        status=uap.about.status,
        cost=evidence.since(before),
    )


def recall(evidence: Evidence, eps: float, folder: Path) -> None:
    """Load what :func:`craft_point` made for this eps when the audit ran before."""
    evidence.uaps[eps] = UniversalPerturbation.load(folder / file_of(eps))
    if (folder / crafted_file_of(eps)).is_file():
        evidence.crafted[eps] = UniversalPerturbation.load(folder / crafted_file_of(eps))
    kept, _ = load_tensors(_errors_file(folder, eps), "the errors of each image")
    evidence.errors[eps] = ImageErrors(kept["wrong"], kept["answers"])


def _borrowed(evidence: Evidence, eps: float) -> list[UniversalPerturbation]:
    """The surrogate's perturbation at the middle eps, which is one more candidate; a black box has it among its own."""
    if evidence.subject.black_box or eps != evidence.eps:
        return []
    found = on_surrogate(evidence, eps)
    if found is None or evidence.surrogate is None:
        return []
    name = f"{found.about.attack} on surrogate ({name_of(evidence.surrogate)})"
    return [UniversalPerturbation(found.delta, found.about.model_copy(update={"attack": name}), found.image_hashes)]


def _craft(evidence: Evidence, eps: float, smaller: UniversalPerturbation | None) -> UniversalPerturbation:
    if evidence.subject.black_box:
        return black_box.craft(evidence, eps, None if smaller is None else (smaller.about.attack, smaller.delta))
    start = None if smaller is None else smaller.delta
    return evidence.suite.universal(eps).craft(evidence.victim, evidence.data, seed=evidence.seed, start=start)


def end_curve(evidence: Evidence) -> None:
    """Let the curve end with the last eps that a black box's budget had room for."""
    done, suite = len(evidence.universal), evidence.suite
    if not done:
        raise UserError("the budget was spent before one perturbation was crafted: give a larger --budget")
    if done < len(suite.eps):
        evidence.suite = suite.model_copy(update={"eps": suite.eps[:done]})


def search_eps_uni(evidence: Evidence, runs: int | None = None) -> EpsUni:
    """Search eps_uni by the attack of the curve, beginning from the curve's points; ``runs`` overrules the suite."""
    suite = evidence.suite

    def craft(eps: float, best: torch.Tensor | None) -> UniversalPerturbation:
        if evidence.subject.black_box:
            return black_box.craft(evidence, eps, None if best is None else ("scaled", best))
        attack = suite.universal(eps, restarts=1)  # the best so far is one more start
        return attack.craft(evidence.victim, evidence.data, seed=evidence.seed, start=best)

    return search(
        evidence.victim,
        evidence.data,
        craft,
        norm=suite.norm,
        delta=suite.eps_uni_delta,
        tolerance=suite.eps_uni_tolerance,
        seed=evidence.seed,
        known={point.eps: Found(evidence.uaps[point.eps], evidence.errors[point.eps]) for point in evidence.universal},
        controls=suite.controls,
        runs=suite.eps_uni_runs if runs is None else runs,
        clean=ImageErrors.of(evidence.predictions, evidence.test),
    )


def search_eps_adv(evidence: Evidence) -> EpsAdv | None:
    """Search eps_adv by PGD with a single start, on the images that diagnostics look at; None for a black box."""
    suite = evidence.suite
    if evidence.subject.black_box or not suite.eps_adv:
        return None
    attack = suite.pgd(evidence.eps).model_copy(update={"restarts": 1})
    if evidence.subject.random:
        attack = attack.model_copy(update={"draws": suite.gradient_draws})
    return eps_adv(
        evidence.victim,
        evidence.sample,
        attack,
        delta=suite.eps_uni_delta,
        tolerance=max(suite.eps_uni_tolerance, _COARSE),
        seed=evidence.seed,
    )


_COARSE = 0.05
"""Tolerance of eps_adv, whose interval is wider on the few images of the sample."""


def rescored(evidence: Evidence, uap: UniversalPerturbation) -> float:
    """Error on test of a stored perturbation, taken once more."""
    return score(_predicted(evidence, uap), evidence.test).error


def _predicted(evidence: Evidence, uap: UniversalPerturbation) -> torch.Tensor:
    return predict(evidence.victim, evidence.test, uap.delta.to(evidence.victim.device))
