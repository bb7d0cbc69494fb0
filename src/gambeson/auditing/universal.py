"""The audit's universal perturbations: one at every eps of the curve, and the smallest eps that is enough."""

from __future__ import annotations

from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import black_box
from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Restart, Universal
from gambeson.base import UserError
from gambeson.evaluation.eps_uni import search
from gambeson.evaluation.results import EpsUni
from gambeson.evaluation.universal import change_rate, control_rates, error_rate
from gambeson.victim import predict, score


def file_of(eps: float) -> str:
    """Name of the file that the perturbation of this eps is kept in."""
    return f"uap-{eps:.4g}.safetensors"


def craft_point(evidence: Evidence, eps: float, folder: Path | None) -> Universal:
    """Craft the perturbation of one eps, beginning from that of the next smaller one, and score it on test."""
    before = evidence.spent
    smaller = max((known for known in evidence.uaps if known < eps), default=None)
    uap = _craft(evidence, eps, None if smaller is None else evidence.uaps[smaller])
    evidence.uaps[eps] = uap
    if folder is not None:
        uap.save(folder / file_of(eps))
    found = score(_predicted(evidence, uap), evidence.test, evidence.predictions)
    return Universal(
        attack=uap.about.attack,
        eps=eps,
        norm=evidence.suite.norm,
        uer=error_rate(found),
        fooling=change_rate(found),
        controls=control_rates(evidence.victim, evidence.test, uap.ball, evidence.seed),
        restarts=[Restart(start=kind, validation_uer=rate) for kind, rate in uap.about.restarts],
        file=file_of(eps),
        status=uap.about.status,
        cost=evidence.since(before),
    )


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
        known={point.eps: (point.uer.value, evidence.uaps[point.eps].delta) for point in evidence.universal},
        runs=suite.eps_uni_runs if runs is None else runs,
        clean=evidence.clean.complement.value,
    )


def rescored(evidence: Evidence, uap: UniversalPerturbation) -> float:
    """Error on test of a stored perturbation, taken once more."""
    return score(_predicted(evidence, uap), evidence.test).error


def _predicted(evidence: Evidence, uap: UniversalPerturbation) -> torch.Tensor:
    return predict(evidence.victim, evidence.test, uap.delta.to(evidence.victim.device))
