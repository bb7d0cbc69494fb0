"""The edits stage: what the perturbation of the middle eps does after JPEG, resizing, shifts and other edits."""

from __future__ import annotations

from gambeson.auditing.context import AuditContext
from gambeson.evaluation.edits import EditsResult, edited_rates, fitting


def measure(context: AuditContext) -> EditsResult | None:
    """Measure the edits of the suite that fit the data, on a sample of test; None where the suite has none."""
    suite = context.suite
    if not suite.edits:
        return None
    few = context.few(suite.edit_images)
    found, left_out = fitting(suite.edits, few)
    result = edited_rates(context.victim, few, context.uaps[context.eps], found, seed=context.seed)
    return result.model_copy(update={"left_out": left_out})
