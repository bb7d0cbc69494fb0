"""The audit: stages that measure, diagnostics that check, and a verdict."""

from gambeson.auditing.audit import Audit, audit
from gambeson.auditing.comparison import Comparison, compare
from gambeson.auditing.context import AuditContext
from gambeson.auditing.cost import AuditPlan
from gambeson.auditing.diagnostics import DIAGNOSTICS, Diagnostic, Finding, register
from gambeson.auditing.display import plot_audits
from gambeson.auditing.gates import GateReport, judge_gates, parse_gates
from gambeson.auditing.results import AuditResult, Check, Verdict
from gambeson.auditing.run import AuditRun, plan_audit, run_audit
from gambeson.auditing.suite import SUITES, Suite
from gambeson.auditing.verdict import Lead, Outcome, lead_of

__all__ = [
    "DIAGNOSTICS",
    "SUITES",
    "Audit",
    "AuditContext",
    "AuditPlan",
    "AuditResult",
    "AuditRun",
    "Check",
    "Comparison",
    "Diagnostic",
    "Finding",
    "GateReport",
    "Lead",
    "Outcome",
    "Suite",
    "Verdict",
    "audit",
    "compare",
    "judge_gates",
    "lead_of",
    "parse_gates",
    "plan_audit",
    "plot_audits",
    "register",
    "run_audit",
]
