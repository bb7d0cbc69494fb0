"""Images that nobody reports on: what a model withstands on the test split, it must withstand there too."""

from __future__ import annotations

from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import PairedDifference
from gambeson.evaluation.outcome import outcome_under

_MORE = 0.03
"""Difference beyond which it counts: two honest splits of one data set differ a little, and the perturbation that is
tried was the best of several on validation. Ours."""


@register(
    "no test-set leakage",
    condition="under the same attack clearly more test images than validation images keep their answer, by "
    f"{100 * _MORE:g} points",
    explanation="The model is more robust on the images that it is scored on than on others of the same kind: it "
    "knows them, or the test split is easier than the data.",
    remedy="Find out whether the test images, or near copies of them, went into the model; score it on images that "
    "nobody has seen.",
    gradients=False,
    comparisons=2,
)
def _alike(context: AuditContext) -> Finding:
    splits = [context.test, context.data.validation]
    if context.subject.black_box:  # every image costs a query
        splits = [context.sample, context.unseen]
    delta = context.uaps[context.eps].delta
    pairs = {"the perturbation": [outcome_under(context.victim, split, delta) for split in splits]}
    if not context.subject.black_box:
        pgd = context.suite.pgd(context.eps)
        pairs["PGD"] = [context.outcome(pgd), context.outcome(pgd, "unseen")]
    gains = {name: PairedDifference.across(test, other) for name, (test, other) in pairs.items()}
    worst = max(gains, key=lambda name: gains[name].low)
    test, other = (found.accuracy for found in pairs[worst])
    of = "the" if context.test.task.per_image_label else "the pixels of"
    return Finding(
        gains[worst].low <= _MORE,
        f"under {worst} of eps {context.eps:.4g} {test} of {of} test images stand and {other} of {of} "
        f"validation images, of which it breaks {gains[worst].beyond(_MORE)}",
        {"test": test.value, "validation": other.value, "gap": gains[worst].value},
    )
