"""Images that nobody reports on: what a model withstands on the test split, it must withstand there too."""

from __future__ import annotations

from gambeson.auditing.context import Evidence
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import Gain
from gambeson.evaluation.outcome import outcome_under

_MORE = 0.03
"""Difference beyond which it counts: two honest splits of one data set differ a little, and the perturbation that is
tried was the best of several on validation. Ours."""


@register(
    "unseen images stand as well",
    condition="under the same attack clearly more test images than validation images keep their answer, by "
    f"{100 * _MORE:g} points",
    explanation="The model withstands more on the images that it is scored on than on others of the same kind: it "
    "knows them, or the test split is easier than the data.",
    remedy="Find out whether the test images, or near copies of them, went into the model; score it on images that "
    "nobody has seen.",
    gradients=False,
)
def _alike(evidence: Evidence) -> Finding:
    splits = [evidence.test, evidence.data.validation]
    if evidence.subject.black_box:  # every image costs a query
        splits = [evidence.sample, evidence.unseen]
    delta = evidence.uaps[evidence.eps].delta
    pairs = {"the perturbation": [outcome_under(evidence.victim, split, delta) for split in splits]}
    if not evidence.subject.black_box:
        pgd = evidence.suite.pgd(evidence.eps)
        pairs["PGD"] = [evidence.outcome(pgd, unseen=other) for other in (False, True)]
    gains = {name: Gain.across(test, other) for name, (test, other) in pairs.items()}
    worst = max(gains, key=lambda name: gains[name].low)
    test, other = (found.rate for found in pairs[worst])
    return Finding(
        gains[worst].low <= _MORE,
        f"under {worst} of eps {evidence.eps:.4g} {test} of the test images stand and {other} of the validation images",
        {"test": test.value, "validation": other.value, "gap": gains[worst].value},
    )
