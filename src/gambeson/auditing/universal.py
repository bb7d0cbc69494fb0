"""The audit's universal perturbations: one at every eps of the curve, and the smallest eps that is enough."""

from __future__ import annotations

from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Restart, Universal
from gambeson.evaluation.eps_uni import eps_uni
from gambeson.evaluation.results import EpsUni
from gambeson.evaluation.universal import change_rate, control_rates, error_rate
from gambeson.victim import predict, score


def file_of(eps: float) -> str:
    """Name of the file that the perturbation of this eps is kept in."""
    return f"uap-{eps:.4g}.safetensors"


def craft_point(evidence: Evidence, eps: float, folder: Path | None) -> Universal:
    """Craft the perturbation of one eps, beginning from that of the next smaller one, and score it on test."""
    before = evidence.spent
    attack = evidence.suite.universal(eps)
    smaller = max((known for known in evidence.uaps if known < eps), default=None)
    start = None if smaller is None else evidence.uaps[smaller].delta
    uap = attack.craft(evidence.victim, evidence.data, seed=evidence.seed, start=start)
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
        controls=control_rates(evidence.victim, evidence.test, attack.ball, evidence.seed),
        restarts=[Restart(start=kind, validation_uer=rate) for kind, rate in uap.about.restarts],
        file=file_of(eps),
        status=uap.about.status,
        cost=evidence.since(before),
    )


def search_eps_uni(evidence: Evidence) -> EpsUni:
    """Search eps_uni, beginning from the points of the curve."""
    known = {point.eps: (point.uer.value, evidence.uaps[point.eps].delta) for point in evidence.universal}
    return eps_uni(
        evidence.victim,
        evidence.data,
        evidence.suite.universal(evidence.suite.eps[0], restarts=1),  # the best so far is one more start
        delta=evidence.suite.eps_uni_delta,
        tolerance=evidence.suite.eps_uni_tolerance,
        seed=evidence.seed,
        known=known,
    )


def rescored(evidence: Evidence, uap: UniversalPerturbation) -> float:
    """Error on test of a stored perturbation, taken once more."""
    return score(_predicted(evidence, uap), evidence.test).error


def _predicted(evidence: Evidence, uap: UniversalPerturbation) -> torch.Tensor:
    return predict(evidence.victim, evidence.test, uap.delta.to(evidence.victim.device))
