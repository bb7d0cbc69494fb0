"""The universal perturbations themselves: crafted ones must beat noise, use their budget, and score alike twice."""

from __future__ import annotations

from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding
from gambeson.auditing.evidence import Evidence
from gambeson.auditing.universal import rescored


def _learnt(evidence: Evidence) -> Finding:
    labels = evidence.test.labels.flatten()
    if evidence.test.ignore_index is not None:
        labels = labels[labels != evidence.test.ignore_index]
    prior = float(labels.bincount().max() / max(1, len(labels)))
    return Finding(
        evidence.clean.low > prior,
        f"clean accuracy {evidence.clean} against {100 * prior:.1f} % for always naming the most frequent class",
        {"accuracy": evidence.clean.value, "prior": prior},
    )


def _beats_controls(evidence: Evidence) -> Finding:
    points = evidence.universal
    losers = [point for point in points if any(point.uer.high < rival.worst.low for rival in point.controls)]
    radii = ", ".join(f"{point.eps:.4g}" for point in losers)
    return Finding(
        not losers,
        "no control does clearly more harm than the crafted perturbation at any eps"
        if not losers
        else f"noise does more harm than the crafted perturbation at eps {radii}",
        {"losers": len(losers)},
    )


def _used(evidence: Evidence) -> Finding:
    idle = ", ".join(f"{point.eps:.4g} ({point.status})" for point in evidence.universal if point.status != "done")
    return Finding(
        not idle, "every perturbation uses its budget" if not idle else f"the attack hardly moved at eps {idle}"
    )


def _agrees(evidence: Evidence) -> Finding:
    point = evidence.middle
    again = rescored(evidence, evidence.uaps[point.eps])
    return Finding(
        again == point.uer.value,
        f"the stored perturbation at eps {point.eps:.4g} gives a UER of {100 * again:.1f} %, reported was {point.uer}",
        {"again": again, "reported": point.uer.value},
    )


DIAGNOSTICS = (
    Diagnostic(
        name="better than guessing",
        condition="the clean accuracy is not clearly above that of always naming the most frequent class",
        explanation="A model that has learnt nothing cannot be called robust.",
        remedy="Train the model, or check that data, classes and normalisation are its own.",
        look=_learnt,
        gradients=False,
    ),
    Diagnostic(
        name="crafted beats controls",
        condition="noise of the same size does clearly more harm than the crafted perturbation",
        explanation="The attack has failed: noise is a perturbation that it could have found.",
        remedy="Give the attack more steps and restarts; look at the gradients' diagnostics.",
        look=_beats_controls,
        gradients=False,
    ),
    Diagnostic(
        name="budget used",
        condition="a crafted perturbation stays below 5 % of its eps",
        explanation="The attack hardly moved: it had no gradient to follow.",
        remedy="Look at the gradients' diagnostics.",
        look=_used,
        gradients=False,
    ),
    Diagnostic(
        name="re-scoring agrees",
        condition="the stored perturbation does not give the reported rate once more",
        explanation="The rate is not a property of model and perturbation alone.",
        remedy="Find what else the answer depends on: randomness, a state kept between calls, the make-up of a batch.",
        look=_agrees,
        gradients=False,
    ),
)
