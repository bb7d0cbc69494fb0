"""Audits as measurements of a study."""

from __future__ import annotations

import shutil
from typing import Literal

from gambeson.auditing.display import worst_of
from gambeson.auditing.results import AuditResult
from gambeson.auditing.run import AuditRun, AuditSuite, run_audit
from gambeson.auditing.suite import SUITES
from gambeson.base import UserError, check_run
from gambeson.studies.measures import Measure, Measured, TrainedModel, Value


class AuditMeasure(Measure):
    """An audit of ``gambeson audit``: its headline numbers are metrics, and a page shows the rest."""

    kind: Literal["audit"] = "audit"
    suite: AuditSuite = SUITES["quick"]
    """The suite's name or its settings; without ``eps``, the curve has half, once and one and a half times the eps."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Run the audit, or resume it."""
        suite = self.suite
        if not suite.eps:
            suite = suite.model_copy(update={"eps": tuple(k * self.radius(trained) for k in (0.5, 1.0, 1.5))})
        run = AuditRun(
            model=str(trained.folder),
            data=None,
            suite=suite,
            seed=trained.seed,
            device=str(next(trained.model.parameters()).device),
        )
        out = trained.out / "audit"
        try:
            check_run(out, run)
        except UserError:  # begun elsewhere, on another device, or damaged: nothing of it is known to be right
            shutil.rmtree(out, ignore_errors=True)
        return of_audit(run_audit(run, out, trained.data).results)


def of_audit(result: AuditResult) -> Measured:
    """Return the headline numbers of an audit."""
    found = {"clean": Value.of(result.clean), "uer": Value.of(result.middle.uer)}
    for name, size in (("eps_uni", result.eps_uni), ("eps_adv", result.eps_adv)):
        if size is not None:
            found[name] = Value(value=size.value, low=size.low, high=size.high, censored=size.censored)
    if (worst := worst_of(result)) is not None:
        found["attacked"] = Value.of(worst.accuracy)
    if result.jacobian is not None:
        if result.jacobian.sharing is not None:
            found["sharing"] = Value(value=result.jacobian.sharing)
        if (norms := result.jacobian.norms) is not None:
            found["jacobian"] = Value(value=norms.frobenius.mean)
    found["trusted"] = Value(value=float(result.verdict.trusted))
    failed = {check.name: check.detail for check in result.checks if check.passed is False}
    curve = {f"{point.eps:.4g}": str(point.uer) for point in result.universal}
    about = {
        "summary": result.verdict.summary,
        "reasons": result.verdict.reasons,
        "failed": failed,
        "UER by eps": curve,
    }
    return Measured(metrics=found, verdict=about)
