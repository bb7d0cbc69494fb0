"""From numbers and checks to words. A failed check turns the verdict, whatever the numbers say."""

from __future__ import annotations

from gambeson.auditing.results import Check, Universal, Verdict
from gambeson.evaluation import Rate
from gambeson.evaluation.results import EpsUni


def judge(clean: Rate, points: list[Universal], found: EpsUni, checks: list[Check]) -> Verdict:
    """State what one pattern does to the model at the middle eps, and whether that can be trusted."""
    point = points[len(points) // 2]
    rival = max(point.controls, key=lambda control: control.worst.value)
    share = f"{100 * found.delta:g} %"
    if point.uer.low >= found.delta:
        lead = "Broken by one pattern"
    elif point.uer.high < found.delta:
        lead = f"Not brought to an error of {share} by one pattern"
    else:
        lead = f"On the edge of an error of {share} under one pattern"
    bound = f"more than {found.value:.3g}" if found.censored else f"at most {found.value:.3g}"
    summary = (
        f"{lead} at eps {point.eps:.3g}: it misclassifies {point.uer} of test images, against {clean.complement} when "
        f"clean and {rival.worst} under the strongest control ({rival.name}). eps_uni({found.delta:g}) is {bound}."
    )
    failed = [check for check in checks if check.passed is False]
    if failed:
        summary = f"Not to be trusted ({', '.join(check.name for check in failed)}). {summary}"
    reasons = [f"{check.name}: {check.detail}. {check.explanation}" for check in failed]
    return Verdict(trusted=not failed, summary=summary, reasons=reasons)
