"""Honest numbers: rates with intervals, controls beside attacks, checks that can overturn a verdict."""

from gambeson.evaluation.audit import Audit, audit
from gambeson.evaluation.eps_uni import eps_uni
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import AuditResult
from gambeson.evaluation.run import AuditRun, run_audit
from gambeson.evaluation.suite import SUITES, Suite
from gambeson.evaluation.universal import accuracy, fooling_rate, universal_evasion

__all__ = [
    "SUITES",
    "Audit",
    "AuditResult",
    "AuditRun",
    "Rate",
    "Suite",
    "accuracy",
    "audit",
    "eps_uni",
    "fooling_rate",
    "run_audit",
    "universal_evasion",
]
